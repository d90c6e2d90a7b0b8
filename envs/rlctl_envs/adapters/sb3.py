"""Our environments as a Stable-Baselines3 `VecEnv`: numpy in and out, four-tuple steps, one `dones`.

    from stable_baselines3 import PPO
    model = PPO("MlpPolicy", SB3VecEnv(rlctl_envs.make("Hopper", 8, seed=0)))

Both libraries reset in the step that ends an episode, so nothing is lost between them: the true successor goes into
`infos[i]["terminal_observation"]`, and `infos[i]["TimeLimit.truncated"]` says that the value of it is not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlctl_envs.contract import VecEnv

try:
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import VecEnv as PeerVecEnv
except ImportError as e:
    raise ValueError("this needs Stable-Baselines3: pip install 'rlctl[sb3]'") from e


class SB3VecEnv(PeerVecEnv):  # type: ignore[misc, unused-ignore]
    """`env` as Stable-Baselines3 wants it. Actions [N, A] in [-1, 1] as float32, like the action space says.

    Where an episode ends, `infos[i]` also holds what SB3's `Monitor` would put there: `episode` with the raw return
    `r` and the length `l`. `last` are the raw reward [N] and the episode ends [N] of the latest step, as tensors.
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env
        self.last: tuple[Tensor, Tensor] | None = None
        self._actions: NDArray[Any] | None = None
        self._ret = np.zeros(env.num_envs)
        self._length = np.zeros(env.num_envs, np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> NDArray[Any]:
        """Observations [N, O]. After `seed(s)` the random stream restarts at s, otherwise it goes on."""
        obs, _ = self.env.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        self._ret[:], self._length[:] = 0, 0
        return _array(obs)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions [N, A] for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], list[dict[str, Any]]]:
        """(obs [N, O], raw reward [N], dones [N], infos)."""
        assert self._actions is not None
        obs, reward, terminated, truncated, info = self.env.step(torch.from_numpy(np.asarray(self._actions)))
        done = terminated | truncated
        self.last = (reward, done)
        rewards, dones = _array(reward), _array(done)
        self._ret += rewards
        self._length += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            cut, last_obs = _array(truncated & ~terminated), _array(info["next_obs"])
            for i in np.flatnonzero(dones):
                infos[i] = {
                    "terminal_observation": last_obs[i],
                    "TimeLimit.truncated": bool(cut[i]),
                    "episode": {"r": float(self._ret[i]), "l": int(self._length[i])},
                }
            self._ret[dones], self._length[dones] = 0, 0
        return _array(obs), rewards, dones, infos

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of the one environment that holds all worlds, once per world asked for."""
        value = None if attr_name == "render_mode" else getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: the worlds are one object and cannot be set one by one."""
        raise NotImplementedError(f"{self.env!r}: its worlds are one object; make the environment with other settings")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Refused: the worlds are one object and cannot be called one by one."""
        raise NotImplementedError(f"{self.env!r}: its worlds are one object; call .env.{method_name} itself")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """No wrapper at all, but what `Monitor` reports is reported."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


class SpacesOnly(PeerVecEnv):  # type: ignore[misc, unused-ignore]
    """Spaces and a number of worlds, for a model that is built before its environment; it cannot be stepped."""

    def __init__(self, obs_dim: int, act_dim: int, num_envs: int) -> None:
        box = gymnasium.spaces.Box
        obs, action = box(-np.inf, np.inf, (obs_dim,), np.float32), box(-1.0, 1.0, (act_dim,), np.float32)
        super().__init__(num_envs, obs, action)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this stands for an environment that is not there yet: model.set_env(SB3VecEnv(env)) first")

    reset = step_async = step_wait = set_attr = env_method = _refuse

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> Sequence[Any]:
        """No attributes, and no rendering."""
        if attr_name != "render_mode":
            raise AttributeError(attr_name)
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Not wrapped."""
        return [False] * self.num_envs


def _array(x: Tensor) -> NDArray[Any]:
    return x.detach().cpu().numpy()
