"""The world as a stable-baselines3 `VecEnv`: one step is one batch of calls over all episodes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from teams_hpc.policy.environment import Episode, Key, World
from teams_hpc.policy.tally import Tally
from teams_hpc.rewriting.identity import keyed_seed
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.seeds import Seed


class RewritingVecEnv(VecEnv):  # type: ignore[misc]  # stable-baselines3 is not typed for mypy
    """Episodes of fixed length side by side, keyed by what `restart` was given.

    The end of an episode is a termination, not a truncation: the task is to earn the most in so
    many steps, the observation `features` holds the step, so what follows is worth nothing and no
    value is bootstrapped. With `one_hot` (as published) the step is hidden, and the published code
    ends its episodes the same way.

    Args:
        world: Instructor, reviewer and settings.
        seeds: Seeds of the split that the policy is trained on.
    """

    def __init__(self, world: World, seeds: Sequence[Seed]) -> None:
        size = world.observer.size
        super().__init__(
            num_envs=world.settings.num_envs,
            observation_space=spaces.Box(-np.inf, np.inf, (size,), np.float32),
            action_space=spaces.Discrete(len(OPERATIONS)),
        )
        self.tally = Tally()
        self._world = world
        self._settings = world.settings
        self._seeds_to_draw = tuple(seeds)
        self._key: Key = ()
        self._num_begun = 0
        self._episodes: list[Episode] = []
        self._actions: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def restart(self, key: Key) -> None:
        """Forget everything; episodes of the next `reset` follow from `key` alone."""
        self._key = key
        self._num_begun = 0
        self._episodes = []
        self.tally = Tally()

    def reset(self) -> NDArray[np.float32]:
        self._episodes = [self._begin() for _ in range(self.num_envs)]
        return self._observations()

    def _begin(self) -> Episode:
        key = (*self._key, self._num_begun)
        self._num_begun += 1
        drawn = keyed_seed(*key, "seed") % len(self._seeds_to_draw)
        return Episode.begin(key, self._seeds_to_draw[drawn])

    def _observations(self) -> NDArray[np.float32]:
        return np.stack([self._world.observation(episode) for episode in self._episodes])

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """One step of all episodes.

        Raises:
            EngineError: An engine failed.
        """
        operations = self._actions.tolist()
        outcomes = self._world.step(self._episodes, operations)
        self.tally.add(operations, outcomes)
        observations = self._observations()
        infos: list[dict[str, Any]] = [{} for _ in self._episodes]
        # All episodes are equally long, so all end at once.
        is_over = self._episodes[0].history.step >= self._settings.episode_length
        if is_over:
            infos = [
                {"terminal_observation": last, "TimeLimit.truncated": False}
                for last in observations
            ]
            observations = self.reset()
        rewards = np.array([outcome.reward for outcome in outcomes], dtype=np.float32)
        return observations, rewards, np.full(self.num_envs, is_over), infos

    def close(self) -> None:
        """Nothing to free: engines belong to whoever loaded them."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(f"episodes have no attribute {attr_name!r}")

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"episodes have no attribute {attr_name!r}")

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        raise AttributeError(f"episodes have no method {method_name!r}")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs
