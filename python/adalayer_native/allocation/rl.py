"""Method "rl": bit-widths by deep Q-learning over the layers.

After Jung, Kim, Kim and Kim, "Reinforcement learning-based layer-wise quantization for lightweight
deep neural networks", ICIP 2020: an agent gives one layer after the other a width,
looking at its number of parameters and at what is left of the budget. What the paper leaves open is
ours: the state, the reward, that widths which would break the budget are not offered, and that the
first plan is the widest uniform one, so that the search never ends below it.

It is a search without tables: all it ever sees is the loss of whole plans. Method "optimal" decides
from measured errors of single layers and prunes, too; ``python -m bench.search`` compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .._progress import ProgressBar
from ..errors import PlanError
from ..plan import MAX_BITS, MIN_BITS, Plan
from .evaluate import Evaluator, Measurement, best_of
from .options import Choice, Option
from .problem import Problem

if TYPE_CHECKING:
    from .request import Request

__all__ = ["RLSettings", "rl", "solve"]

FEATURES = 6
WIDTHS = MAX_BITS - MIN_BITS + 1
BATCH = 64  # transitions per gradient step
UPDATES = 1  # gradient steps per decision: an episode's reward has to get back to its first layer
FOLLOW = 0.05  # of the way that the target network follows per step
GREEDY = 0.5  # share of the episodes over which exploration falls to its end
EXPLORE = 0.05
FAR = 0.25  # share of explored decisions that take any width; the others take a neighbouring one


@dataclass(frozen=True)
class RLSettings:
    """Options of method ``"rl"``.

    Attributes:
        episodes: plans that are drawn; equal ones are measured once.
        seed: of the network and of the exploration.
        hidden: units of each of the network's two hidden layers.
        rate: step of the Adam optimizer.
    """

    episodes: int = 200
    seed: int = 0
    hidden: int = 64
    rate: float = 2e-3

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> RLSettings:
        """Settings from a mapping.

        Raises:
            PlanError: an unknown option, or a value out of range.
        """
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(options or {}) - known)
        if unknown:
            raise PlanError(f"unknown options {unknown}: expected some of {sorted(known)}")
        found = cls(**(options or {}))
        if found.episodes < 1 or found.hidden < 1 or not found.rate > 0:
            raise PlanError("episodes and hidden must be at least 1, and rate above 0")
        return found


def solve(request: Request) -> Plan:
    """The plan for a request."""
    request.check_data()
    assert request.evaluator is not None
    settings = RLSettings.of(request.options)
    return rl(request.problem, request.evaluator, settings, progress=request.progress)


def rl(
    problem: Problem, evaluator: Evaluator, settings: RLSettings, *, progress: bool = True
) -> Plan:
    """The best plan that the search measured; the same seed gives the same plan."""
    decisions = _Decisions(problem)
    agent = _Agent(settings)
    random = np.random.default_rng(settings.seed)
    seen: dict[bytes, Measurement] = {}
    reference: float | None = None
    with ProgressBar("trying plans", settings.episodes, unit="plan", enabled=progress) as bar:
        try:
            for episode in range(settings.episodes):
                # The last plan is what the network itself thinks best.
                explore = 0.0
                if episode + 1 < settings.episodes:
                    share = min(1.0, episode / max(1.0, GREEDY * settings.episodes))
                    explore = 1.0 + share * (EXPLORE - 1.0)
                first = decisions.uniform if episode == 0 else None
                states, masks, actions = decisions.episode(agent, explore, random, first)
                key = actions.tobytes()
                if key not in seen:
                    seen[key] = evaluator.measure(problem.full(decisions.choice(actions)))
                loss = seen[key].loss
                reference = loss if reference is None else reference
                # In the logarithm: losses of plans differ by orders of magnitude.
                agent.learn(states, masks, actions, -_log_ratio(loss, reference), random)
                bar.advance(1, f"best loss {min(m.loss for m in seen.values()):.4f}")
        finally:
            evaluator.save()
    keys, measured = list(seen), list(seen.values())
    best = best_of(measured, evaluator.samples)
    actions = np.frombuffer(keys[best], dtype=np.int64)
    hyper = {"episodes": float(settings.episodes), "seed": float(settings.seed)}
    plan = problem.plan(decisions.choice(actions), "rl", hyper)
    plan.measured = {**measured[best].as_dict(), "plans_tried": float(len(seen))}
    return plan


def _log_ratio(loss: float, reference: float) -> float:
    floor = 1e-9
    return float(np.log(max(loss, floor) / max(reference, floor)))


# A state, what was done there, its reward, the state after it, what is offered there, and the end.
Transition = tuple[np.ndarray, int, float, np.ndarray, np.ndarray, bool]


class _Decisions:
    """The network as a sequence of decisions within a budget."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        table, constant, _ = problem.cost_table()
        self.costs = table[:, :, 0]  # unpruned
        limit = np.inf if problem.limit is None else problem.limit
        self.room = limit - constant
        cheapest = self.costs.min(axis=1)
        # What the layers after each one need at least.
        self.rest = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0.0)
        # Where even these seem too much the bound was too high: the file itself fits with 2 bits
        # everywhere (that is checked before), and with nothing else.
        counts = np.array([problem.layers[name].weight.numel() for name in problem.free], float)
        self.size = np.log(counts) / np.log(counts.max()) if counts.max() > 1 else counts
        self.share = counts / counts.sum()

        fitting = self.costs.sum(axis=0) <= self.room + 1e-9
        widest = int(np.flatnonzero(fitting).max()) if fitting.any() else 0
        self.uniform = np.full(len(self.costs), widest, dtype=np.int64)

    def choice(self, actions: np.ndarray) -> Choice:
        widths = (actions + MIN_BITS).tolist()
        return {n: Option(b) for n, b in zip(self.problem.free, widths, strict=True)}

    def episode(
        self,
        agent: _Agent,
        explore: float,
        random: np.random.Generator,
        given: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States ``[layers, 6]``, offered widths ``[layers, 7]`` and the widths taken or given."""
        layers = len(self.costs)
        states = np.zeros((layers, FEATURES), dtype=np.float32)
        masks = np.zeros((layers, WIDTHS), dtype=bool)
        actions = np.zeros(layers, dtype=np.int64)
        spent = 0.0
        finite = np.isfinite(self.room)
        for layer in range(layers):
            left = self.room - spent - self.rest[layer]
            masks[layer] = self.costs[layer] <= left + 1e-9
            masks[layer, 0] = True
            wide = self.costs[layer:, -1].sum()
            states[layer] = (
                layer / max(1, layers - 1),
                self.size[layer],
                self.share[layer],
                min(1.0, (self.room - spent) / wide) if finite and wide > 0 else 1.0,
                masks[layer].mean(),
                (actions[layer - 1] + MIN_BITS) / MAX_BITS if layer else 0.0,
            )
            if given is not None:
                actions[layer] = given[layer]
                spent += self.costs[layer, actions[layer]]
                continue
            actions[layer] = agent.best(states[layer], masks[layer])
            if random.random() < explore:
                actions[layer] = _explored(int(actions[layer]), masks[layer], random)
            spent += self.costs[layer, actions[layer]]
        return states, masks, actions


def _explored(action: int, mask: np.ndarray, random: np.random.Generator) -> int:
    """Another width: in a deep network, plans of random widths are all alike bad."""
    offered = np.flatnonzero(mask)
    if random.random() >= FAR:
        offered = offered[np.abs(offered - action) <= 1]
    return int(random.choice(offered))


class _Agent:
    """A double deep Q-network with replay (van Hasselt et al., AAAI 2016)."""

    def __init__(self, settings: RLSettings) -> None:
        # Seeded apart from the caller's own random numbers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.online, self.target = (_network(settings.hidden) for _ in range(2))
        self.target.load_state_dict(self.online.state_dict())
        self.optimizer = torch.optim.Adam(self.online.parameters(), settings.rate)
        self.memory: list[Transition] = []
        self.best_reward = -np.inf

    @torch.no_grad()
    def best(self, state: np.ndarray, mask: np.ndarray) -> int:
        values = self.online(torch.from_numpy(state)[None])[0].numpy()
        return int(np.where(mask, values, -np.inf).argmax())

    def learn(
        self,
        states: np.ndarray,
        masks: np.ndarray,
        actions: np.ndarray,
        reward: float,
        random: np.random.Generator,
    ) -> None:
        """Remember an episode, whose reward comes at its end, and take some gradient steps."""
        last = len(actions) - 1
        for layer, action in enumerate(actions.tolist()):
            after = min(layer + 1, last)
            end = layer == last
            self.memory.append((states[layer], action, reward, states[after], masks[after], end))
        self.best_reward = max(self.best_reward, reward)
        with torch.enable_grad():
            for _ in range(UPDATES * len(actions)):
                rows = random.integers(0, len(self.memory), BATCH)
                self._step([self.memory[row] for row in rows])

    def _step(self, rows: list[Transition]) -> None:
        columns = list(zip(*rows, strict=True))
        state, after = (torch.from_numpy(np.stack(columns[k])) for k in (0, 3))
        action = torch.tensor(columns[1])[:, None]
        reward, end = torch.tensor(columns[2]), torch.tensor(columns[5])
        mask = torch.from_numpy(np.stack(columns[4]))
        with torch.no_grad():
            chosen = self.online(after).masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
            future = self.target(after).gather(1, chosen)[:, 0]
            # All that follows is decided, so what an episode reached is a lower bound of the value
            # (optimality tightening, He et al., ICLR 2017), and the best of all an upper one.
            promised = torch.where(end, reward, future).clamp(max=self.best_reward)
            wanted: Tensor = torch.maximum(reward, promised)
        found = self.online(state).gather(1, action)[:, 0]
        loss = nn.functional.smooth_l1_loss(found, wanted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(
                self.target.parameters(), self.online.parameters(), strict=True
            ):
                mine.lerp_(theirs, FOLLOW)


def _network(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, WIDTHS),
    )
