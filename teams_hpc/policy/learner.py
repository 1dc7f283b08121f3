"""TRPO from sb3-contrib, as a pure function of parameters, optimiser state and keys."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import TRPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from teams_hpc.config.schema import PolicyConfig
from teams_hpc.policy.environment import Episode, RewritingWorld, Step
from teams_hpc.rewriting.operation_policy import MlpPolicy
from teams_hpc.rewriting.operations import OPERATIONS

Tensors = dict[str, torch.Tensor]


class RewritingVecEnv(VecEnv):  # type: ignore[misc]
    """`RewritingWorld` as stable-baselines3 wants it; episodes come from `begin_episode`.

    Args:
        world: The environment itself.
        begin_episode: The next episode of an environment, given its number.
    """

    def __init__(self, world: RewritingWorld, begin_episode: Callable[[int], Episode]) -> None:
        size = world.observation_size
        super().__init__(
            world.config.policy.num_envs,
            gym.spaces.Box(0.0, 2.0, shape=(size,), dtype=np.float32),
            gym.spaces.Discrete(len(OPERATIONS)),
        )
        self.world = world
        self.steps: list[list[Step]] = []
        self._begin_episode = begin_episode
        self._episodes: list[Episode] = []
        self._actions: list[int] = []

    def reset(self) -> VecEnvObs:
        """Begin all episodes anew and forget what was recorded."""
        self.steps = []
        self._episodes = [self._begin_episode(number) for number in range(self.num_envs)]
        return self._observations()

    def _observations(self) -> NDArray[np.float32]:
        return np.stack([self.world.observe(episode) for episode in self._episodes])

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = [int(action) for action in actions]

    def step_wait(self) -> VecEnvStepReturn:
        steps = self.world.step(self._episodes, self._actions)
        self.steps.append(steps)
        observations = self._observations()
        is_over = self._episodes[0].history.step >= self.world.config.policy.episode_length
        infos: list[dict[str, Any]] = [{} for _ in steps]
        if is_over:
            # Ends together: the next observation belongs to new episodes, and is a true end.
            for info, observation in zip(infos, observations, strict=True):
                info |= {"terminal_observation": observation, "TimeLimit.truncated": False}
            self._episodes = [self._begin_episode(number) for number in range(self.num_envs)]
            observations = self._observations()
        rewards = np.array([step.reward for step in steps], dtype=np.float32)
        return observations, rewards, np.full(self.num_envs, is_over), infos

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name, None) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("environments are one batch, without attributes of their own")

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        raise NotImplementedError("environments are one batch, without methods of their own")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def build_trpo(env: VecEnv, settings: PolicyConfig, seed: int) -> TRPO:
    """TRPO with the configured constants; initial weights are a function of `seed`."""
    torch.set_num_threads(1)
    width = settings.hidden_size
    model = TRPO(
        "MlpPolicy",
        env,
        learning_rate=settings.critic_learning_rate,
        n_steps=settings.episode_length,
        batch_size=settings.episode_length * env.num_envs,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        cg_max_steps=settings.cg_max_steps,
        cg_damping=settings.cg_damping,
        line_search_max_iter=settings.line_search_max_iter,
        n_critic_updates=settings.critic_updates,
        target_kl=settings.target_kl,
        policy_kwargs={
            "net_arch": {"pi": [width, width], "vf": [width, width]},
            "activation_fn": torch.nn.ReLU,
        },
        seed=seed % 2**32,
        device="cpu",
    )
    model.set_logger(configure(None, []))
    return model


def run_iteration(model: TRPO, seed: int) -> dict[str, float]:
    """One rollout of whole episodes and one update.

    Generators are seeded anew and all episodes begin anew, so the result depends on parameters,
    optimiser state and `seed` alone.

    Returns:
        kl, explained_variance, entropy, value_loss.
    """
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    model._last_obs = None
    _, callback = model._setup_learn(total_timesteps=10**9, reset_num_timesteps=False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=model.n_steps)
    entropy = _entropy(model)
    model.train()
    values = model.logger.name_to_value
    return {
        "kl": float(values["train/kl_divergence_loss"]),
        "explained_variance": float(values["train/explained_variance"]),
        "entropy": entropy,
        "value_loss": float(values["train/value_loss"]),
    }


def _entropy(model: TRPO) -> float:
    """Mean entropy (nats) of the policy over the rollout."""
    observations = torch.as_tensor(model.rollout_buffer.observations)
    with torch.no_grad():
        flat = observations.reshape(-1, observations.shape[-1])
        return float(model.policy.get_distribution(flat).entropy().mean())


def state_tensors(model: TRPO) -> Tensors:
    """Parameters and optimiser state as named tensors."""
    tensors = {
        f"policy.{name}": value.contiguous() for name, value in model.policy.state_dict().items()
    }
    for number, state in model.policy.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    return tensors


def restore_tensors(model: TRPO, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `state_tensors` gave."""
    policy: Tensors = {}
    states: dict[int, Tensors] = {}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        if part == "policy":
            policy[name] = value
        else:
            number, _, entry = name.partition(".")
            states.setdefault(int(number), {})[entry] = value
    model.policy.load_state_dict(policy)
    groups = model.policy.optimizer.state_dict()["param_groups"]
    model.policy.optimizer.load_state_dict({"state": states, "param_groups": groups})


def export_actor(model: TRPO, metadata: Mapping[str, str]) -> MlpPolicy:
    """The actor as the numpy policy that generation reads."""
    state = model.policy.state_dict()
    names = {
        "hidden_0": "mlp_extractor.policy_net.0",
        "hidden_1": "mlp_extractor.policy_net.2",
        "head": "action_net",
    }
    weights = {
        f"{ours}.{part}": state[f"{theirs}.{part}"].double().numpy()
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }
    return MlpPolicy(weights=weights, metadata=dict(metadata))


def summarise(rollout: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """Rewards and operation counts of one rollout, by step of the episode."""
    flat = [step for steps in rollout for step in steps]
    return {
        "mean_reward": float(np.mean([step.reward for step in flat])),
        "reward_by_step": [float(np.mean([step.reward for step in steps])) for steps in rollout],
        "operations_by_step": [
            np.bincount([step.operation for step in steps], minlength=len(OPERATIONS)).tolist()
            for steps in rollout
        ],
    }
