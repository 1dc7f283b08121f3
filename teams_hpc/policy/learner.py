"""TRPO, one exact iteration at a time.

An iteration is a pure function of (parameters, optimiser state, key): every generator that sb3
draws from is seeded anew, all episodes begin anew, and nothing else is carried over. sb3 draws
from the global generators of torch and numpy, which is why a learner needs a process of its own.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from sb3_contrib import TRPO
from stable_baselines3.common.logger import Logger

from teams_hpc.config.policy import PolicyConfig
from teams_hpc.policy.environment import Key
from teams_hpc.policy.tally import saturated_share
from teams_hpc.policy.vec_env import RewritingVecEnv
from teams_hpc.rewriting.identity import keyed_seed
from teams_hpc.rewriting.operation_policy import MlpPolicy

Tensors = dict[str, th.Tensor]

_LAYERS = {
    "hidden_0": "mlp_extractor.policy_net.0",
    "hidden_1": "mlp_extractor.policy_net.2",
    "head": "action_net",
}
_LOGGED = {
    "kl": "train/kl_divergence_loss",
    "value_loss": "train/value_loss",
    "explained_variance": "train/explained_variance",
    "line_search_success": "train/is_line_search_success",
}


class _Trpo(TRPO):  # type: ignore[misc]  # sb3-contrib is not typed for mypy
    def train(self) -> None:
        """Update, unless all advantages are equal: TRPO's step would be zero divided by zero."""
        if np.ptp(self.rollout_buffer.advantages) > 0.0:
            super().train()


class Learner:
    """A policy network with TRPO around it (Schulman et al. 2015), on one torch thread.

    Args:
        environment: Where it acts.
        settings: `policy` of the configuration.
        key: Run seed and member: with the iteration, keys every random number.
    """

    def __init__(self, environment: RewritingVecEnv, settings: PolicyConfig, key: Key) -> None:
        self._environment = environment
        self._settings = settings
        self._key = key
        width = settings.hidden_size
        self._model = _Trpo(
            "MlpPolicy",
            environment,
            learning_rate=settings.critic_learning_rate,
            n_steps=settings.episode_length,
            batch_size=settings.num_envs,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            cg_max_steps=settings.cg_max_steps,
            cg_damping=settings.cg_damping,
            line_search_max_iter=settings.line_search_max_iter,
            n_critic_updates=settings.critic_updates,
            target_kl=settings.target_kl,
            policy_kwargs={
                "net_arch": {"pi": [width, width], "vf": [width, width]},
                "activation_fn": th.nn.ReLU,
            },
            device="cpu",
            seed=self._sb3_seed(0),
        )
        self._model.set_logger(Logger(folder=None, output_formats=[]))

    def _sb3_seed(self, iteration: int) -> int:
        return keyed_seed(*self._key, iteration, "sb3") % 2**32

    def iterate(self, iteration: int) -> dict[str, Any]:
        """Collect one rollout, update, and return its metrics.

        Raises:
            EngineError: An engine failed; the parameters are as before.
        """
        self._environment.restart((*self._key, iteration))
        self._model.set_random_seed(self._sb3_seed(iteration))
        self._model.logger.name_to_value.clear()
        self._model.learn(
            self._settings.num_envs * self._settings.episode_length,
            log_interval=None,
            reset_num_timesteps=True,
        )
        return self._metrics(iteration)

    def _metrics(self, iteration: int) -> dict[str, Any]:
        tally = self._environment.tally
        logged = self._model.logger.name_to_value
        verdicts = tally.verdicts
        return {
            "iteration": iteration,
            "mean_reward": sum(tally.reward_by_step) / len(tally.reward_by_step),
            "reward_by_step": tally.reward_by_step,
            "operations_by_step": tally.operations_by_step,
            "entropy": self._entropy(),
            **{name: _finite(logged.get(key)) for name, key in _LOGGED.items()},
            "accepted_share": tally.accepted_share,
            "saturated_share": saturated_share(verdicts),
            "zero_reasons": tally.zero_reasons,
            "num_verdicts": len(verdicts),
        }

    def _entropy(self) -> float:
        """Mean entropy (nats) of the updated policy over the observations of the rollout."""
        buffer = self._model.rollout_buffer
        flat = buffer.observations.reshape(-1, buffer.observations.shape[-1])
        with th.no_grad():
            distribution = self._model.policy.get_distribution(th.as_tensor(flat))
            return float(distribution.entropy().mean())

    def state(self) -> Tensors:
        """Parameters and the optimiser's state, copied."""
        policy = self._model.policy
        tensors = {f"policy.{name}": value for name, value in policy.state_dict().items()}
        for index, values in policy.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        return {name: value.detach().clone() for name, value in tensors.items()}

    def restore(self, tensors: Mapping[str, th.Tensor]) -> None:
        """Take back what `state` gave."""
        policy = self._model.policy
        parameters = {}
        optimizer: dict[int, Tensors] = {}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if part == "policy":
                parameters[rest] = value
            else:
                index, _, key = rest.partition(".")
                optimizer.setdefault(int(index), {})[key] = value.clone()
        policy.load_state_dict(parameters)
        groups = policy.optimizer.state_dict()["param_groups"]
        policy.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})

    def export(self, metadata: Mapping[str, str]) -> MlpPolicy:
        """The actor alone, as generation reads it."""
        parameters = self._model.policy.state_dict()
        return MlpPolicy(
            weights={
                f"{ours}.{part}": parameters[f"{theirs}.{part}"].double().numpy().copy()
                for ours, theirs in _LAYERS.items()
                for part in ("weight", "bias")
            },
            metadata=dict(metadata),
        )


def _finite(value: Any) -> float | None:
    """A number that JSON can hold; None where there is none (a variance of equal returns)."""
    return float(value) if value is not None and math.isfinite(value) else None
