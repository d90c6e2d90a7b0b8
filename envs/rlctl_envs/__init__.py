"""Vectorised MuJoCo tasks, torch tensors in and out."""
