"""Environments of other libraries behind the `VecEnv` contract."""
