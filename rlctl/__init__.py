"""rlctl: train and compare continuous-control reinforcement-learning agents."""
