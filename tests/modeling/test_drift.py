"""Training by itself raises no alarm, a shift does within 20 steps, and phases follow the cycle, after a resume too."""

import copy
import math
from pathlib import Path

import pytest
import torch
from factories import VOCAB, living_model, mixed_text
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import LifecycleConfig
from living_moe.modeling_living_moe.drift import (
    ALLOWANCE,
    CLIP,
    LEVEL_MEMORY,
    MEMORY,
    QUIET,
    SETTLED,
    THRESHOLD,
    WARM_UP,
    WATCHED,
    DriftDetector,
    LayerEvidence,
    Passes,
    StepEvidence,
    signals_of,
)
from living_moe.training.optimizers import LivingAdamW

ALL = torch.ones(len(WATCHED), dtype=torch.bool)
LOSS = torch.tensor([name == "loss" for name in WATCHED])


def noise(steps: int, seed: int) -> Tensor:
    return torch.randn(steps, len(WATCHED), generator=torch.Generator().manual_seed(seed))


def watch(detector: DriftDetector, values: Tensor, known: Tensor = ALL, first: int = 1) -> list[int]:
    """Steps, from 0, at which a shift began."""
    began = []
    for place, row in enumerate(values):
        before = int(detector.alarms)
        detector.step(row, known, first + place)
        if int(detector.alarms) > before:
            began.append(place)
    return began


# -- the detector ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_stationary_stream_raises_no_alarm(seed: int) -> None:
    assert watch(DriftDetector(), noise(1000, seed)) == []


@pytest.mark.parametrize("signal", range(len(WATCHED)))
@pytest.mark.parametrize("size", [3.0, -3.0])
def test_a_shift_by_three_deviations_is_found_within_20_steps(signal: int, size: float) -> None:
    for seed in range(5):
        values = noise(240, 10 * signal + seed)
        values[220:, signal] += size
        began = watch(DriftDetector(), values)
        assert len(began) == 1 and 220 <= began[0] < 240, f"seed {seed}"


@pytest.mark.parametrize(
    "fall", [lambda t: -0.3 * t, lambda t: 30 * torch.exp(-t / 60), lambda t: 100 * (t + 1) ** -0.3]
)
@pytest.mark.parametrize("seed", range(2))
def test_a_loss_that_falls_its_steady_way_is_no_shift(fall: object, seed: int) -> None:
    values = noise(500, seed)
    values[:, 0] += fall(torch.arange(500.0))  # type: ignore[operator]
    assert watch(DriftDetector(), values, LOSS) == []


def test_one_outlier_and_a_constant_signal_are_no_shift() -> None:
    values = noise(300, 3)
    values[200, 0] = 1000.0
    values[:, 2] = 2.0
    assert watch(DriftDetector(), values) == []
    # Rounding errors of a constant are not a deviation.
    values = torch.full((300, len(WATCHED)), 2.0) + 1e-7 * noise(300, 4).sign()
    assert watch(DriftDetector(), values) == []


def test_a_signal_that_was_always_zero_and_is_no_more_is_a_shift() -> None:
    values = noise(220, 5)
    values[:, 4] = 0.0
    values[200:, 4] = 0.4
    began = watch(DriftDetector(), values)
    assert len(began) == 1 and 200 <= began[0] < 220


def test_each_step_is_the_textbook_sum() -> None:
    """A slow oracle in plain Python, with steps on which a signal is not measured."""
    detector, values = DriftDetector(), noise(400, 8).double()
    values[300:, 0] += 1.0
    level = variance = up = down = 0.0
    count = 0
    for step, row in enumerate(values.tolist()):
        known = torch.zeros(len(WATCHED), dtype=torch.bool)
        known[0] = step % 3 != 0
        detector.step(torch.tensor(row), known, step + 1)
        if not known[0]:
            continue
        x, highest = row[0], 0.0
        if count >= WARM_UP:
            z = max(-CLIP, min(CLIP, (x - level) / math.sqrt(variance)))
            up, down = max(0.0, up + z - ALLOWANCE), max(0.0, down - z - ALLOWANCE)
            highest = max(up, down)
        if highest > THRESHOLD:
            level = variance = up = down = 0.0
            count = 0
            continue
        away = x - level
        if count:
            variance += max(1 / count, 1 / MEMORY) * (away**2 - variance)
        level += max(1 / (count + 1), 1 / LEVEL_MEMORY) * away
        count += 1
        for name, value in (("level", level), ("variance", variance), ("up", up), ("down", down)):
            assert float(getattr(detector, name)[0]) == pytest.approx(value, abs=1e-4), (step, name)
        assert int(detector.count[0]) == count


def layer_evidence(received: list[float], tokens: float | None, pulled: list[float] | None) -> LayerEvidence:
    """Experts 0 and 1 are of one clade, 2 and 3 of another; two places."""
    counts = torch.zeros(4, 4, dtype=torch.float64)
    counts[0] = torch.tensor(received)
    signals = None
    if pulled is not None:
        signals = torch.zeros(4, 4, dtype=torch.float64)
        signals[0, 1], signals[1, 3] = pulled
    total = None if tokens is None else torch.tensor(tokens, dtype=torch.float64)
    return LayerEvidence(CLADES, 6, counts, signals, total, 2)


CLADES = torch.tensor([1, 1, 5, 5])


def test_the_signals_of_a_step_are_means_of_what_was_measured() -> None:
    number = dict(dtype=torch.float64)
    one = layer_evidence([3.0, 1.0, 2.0, 2.0], None, [3.0, 2.0])
    other = layer_evidence([0.0, 2.0, 2.0, 0.0], 4.0, [1.0, 2.0])
    losses = tuple(torch.tensor(loss) for loss in (4.0, float("nan"), 2.0))
    summed = torch.tensor([0.0, 0.0, 0.0, 2.0], **number)
    first = StepEvidence(1, (one, other), Passes(losses, (torch.tensor([1, 2]),), summed))
    nothing = layer_evidence([0.0] * 4, None, None)
    empty = StepEvidence(2, (nothing, other._replace(counts=0 * other.counts, signals=None)), Passes())
    values, known = signals_of([first, empty], torch.device("cpu"))
    assert known[0].all() and values[0].tolist() == pytest.approx([3.0, math.log(2), 1.5, 1.0, 0.25])
    assert not known[1].any() and values.isfinite().all()


@pytest.mark.parametrize("looks", [(), (1,), (2, 3, 7), tuple(range(12))])
def test_nothing_depends_on_when_somebody_looks(looks: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)

    def evidence(step: int) -> StepEvidence:
        layer = layer_evidence(torch.randint(0, 9, (4,), generator=generator).tolist(), None, [step, 2.0])
        return StepEvidence(step, (layer,), Passes((torch.tensor(2.0 + step % 3),)))

    story = [evidence(step) for step in range(1, 13)]
    at_once, later = DriftDetector(), DriftDetector()
    for step, each in enumerate(story):
        at_once.defer(each)
        at_once.settle()
        later.defer(each)
        if step in looks:
            assert torch.equal(later.level, at_once.level)
    assert len(later.backlog) == (12 if not looks else 11 - looks[-1])
    for name, value in at_once.state_dict().items():
        assert torch.equal(value, later.state_dict()[name]), name


# -- phases ------------------------------------------------------------------------------------------------------------


class Life:
    """Shows a detector a loss, noise elsewhere left out, and records the phases it goes through."""

    def __init__(self) -> None:
        self.detector, self.step, self.phases = DriftDetector(), 0, ["stability"]
        self.generator = torch.Generator().manual_seed(0)

    def go(self, steps: int, loss: float, *events: str) -> None:
        for number in range(steps):
            for kind in events if not number else ():
                self.detector.note(kind)
            self.step += 1
            value = loss + 0.1 * float(torch.randn((), generator=self.generator))
            self.detector.step(torch.full((len(WATCHED),), value), LOSS, self.step)
            if self.detector.phase_name != self.phases[-1]:
                self.phases.append(self.detector.phase_name)
                assert int(self.detector.began) == self.step


def test_new_data_leads_once_around_the_cycle() -> None:
    life = Life()
    life.go(200, 2.0, "split")
    assert life.phases == ["stability"], "a split in stability is growth, not self-preservation"
    life.go(20, 4.0)
    assert life.phases[-1] == "new_data" and bool(life.detector.shifting)
    life.go(SETTLED + 10, 4.0, "split")
    assert life.phases[-1] == "self_preservation", "the loss has not fallen"
    life.go(20, 3.0)
    assert life.phases[-1] == "specialisation"
    life.go(5, 3.0, "merge")
    assert life.phases[-1] == "consolidation"
    life.go(100, 3.0)
    assert life.phases[-1] == "new_equilibrium" and not life.detector.shifting
    life.go(QUIET, 3.0)
    assert life.phases == [
        "stability", "new_data", "self_preservation", "specialisation", "consolidation", "new_equilibrium", "stability",
    ]  # fmt: skip
    assert int(life.detector.alarms) == 1


def test_new_data_that_nobody_splits_for_is_absorbed() -> None:
    life = Life()
    life.go(200, 2.0)
    life.go(QUIET + WARM_UP, 4.0)
    assert life.phases == ["stability", "new_data", "new_equilibrium"]


def test_a_split_while_specialising_is_self_preservation_and_another_shift_is_new_data() -> None:
    life = Life()
    life.go(200, 2.0)
    life.go(10, 4.0)
    life.go(2, 4.0, "split")
    life.go(SETTLED + 20, 3.0)
    life.go(1, 3.0, "split")
    assert life.phases[-3:] == ["self_preservation", "specialisation", "self_preservation"]
    life.go(SETTLED + 40, 3.0)
    assert life.phases[-1] == "specialisation"
    life.go(10, 6.0)
    assert life.phases[-1] == "new_data"


def test_what_a_merge_moves_is_not_taken_for_the_streams_doing() -> None:
    detector = DriftDetector()
    values = noise(400, 6)
    watch(detector, values[:200])
    detector.note("merge")
    values[200:, 1] += 5.0  # entropy of routing
    assert watch(detector, values[200:], first=201) == []
    again = DriftDetector()
    assert watch(again, values) != []


def test_a_detector_is_resumed_in_the_middle_of_a_shift() -> None:
    values = noise(300, 7)
    values[150:, 0] += 5.0
    whole, first = DriftDetector(), DriftDetector()
    watch(whole, values)
    watch(first, values[:160])
    second = DriftDetector()
    second.load_state_dict(first.state_dict())
    watch(second, values[160:], first=161)
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, second.get_buffer(name)), name
    half = copy.deepcopy(whole).half()
    assert all(half.get_buffer(name).dtype == buffer.dtype for name, buffer in whole.named_buffers())


# -- in a model --------------------------------------------------------------------------------------------------------


def test_a_model_trains_1000_steps_without_an_alarm_and_notices_new_text() -> None:
    model = living_model("mixtral", num_hidden_layers=1, sections={"lifecycle": {"interval": 50}}).train()
    optimizer = LivingAdamW(model, lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    chain = torch.rand(VOCAB - 3, VOCAB - 3, generator=generator) ** 8

    def train(steps: int, mirrored: bool = False) -> None:
        for _ in range(steps):
            ids = [torch.randint(0, VOCAB - 3, (8,), generator=generator)]
            for _ in range(7):
                ids.append(torch.multinomial(chain[ids[-1]], 1, generator=generator)[:, 0])
            text = torch.stack(ids, dim=1)
            text = VOCAB - 1 - text if mirrored else text + 3
            model(text, labels=text, use_cache=False).loss.backward()
            optimizer.step()
            model.lifecycle_step(optimizer)
            optimizer.zero_grad()

    train(1000)
    assert int(model.model.drift.alarms) == 0 and (model.phase, model.vigilance) == ("stability", 1.0)
    train(20, mirrored=True)
    assert model.phase in ("new_data", "self_preservation") and model.vigilance == 1.5
    assert int(model.signals()["phase_since"]) > 1000
    model.config.lifecycle.drift_vigilance = 1.0
    assert model.vigilance == 1.0


def test_the_detector_sees_the_loss_the_routing_and_the_fields_of_training_only() -> None:
    model = living_model("mixtral", "frozen-graft", sections={"vitals": {"signals_every": 1}})
    drift, ids = model.model.drift, mixed_text(4, 8)
    model(ids, labels=ids)
    assert drift.passes == Passes()
    model.train()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    losses = [float(model(ids, attention_mask=mask, labels=ids).loss.detach()) for _ in range(2)]
    outside = float((model.model.fields(ids, mask).index > 0)[mask.bool()].float().mean())
    assert 0 < outside < 1
    model.lifecycle_step()
    assert drift.passes == Passes() and drift.count.tolist() == [1] * len(WATCHED)
    found = dict(zip(WATCHED, drift.level.tolist(), strict=True))
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert found["density"] == 2.0 and 0 < found["entropy"] <= math.log(8) + 1e-6
    assert found["outside_root"] == pytest.approx(outside, abs=1e-6)
    signals = model.signals()
    measured = torch.cat([model.vitals(layer)["interference"] for layer in range(2)])
    assert signals["interference"] == pytest.approx(float(measured[measured > 0].mean()), rel=1e-5)
    assert "conflict" not in signals and signals["divergence"] == pytest.approx(0.0, abs=1e-6)


def test_a_split_does_not_move_the_entropy_the_detector_sees() -> None:
    levels = []
    for splits in (0, 3):
        model = living_model("mixtral").train()
        for _ in range(splits):
            model.split_expert(0, 3)
        model(mixed_text(4, 8))
        model.lifecycle_step()
        levels.append(float(model.model.drift.level[1]))
    assert levels[0] == pytest.approx(levels[1])


def test_a_model_is_saved_with_its_phase(tmp_path: Path) -> None:
    model = living_model("mixtral").train()
    model(mixed_text(4, 8), labels=mixed_text(4, 8))
    model.lifecycle_step()
    model.model.drift.phase.fill_(3)
    model.split_expert(0, 1)
    model.save_pretrained(tmp_path)
    again = LivingMoeForCausalLM.from_pretrained(tmp_path)
    assert (again.phase, again.vigilance) == ("self_preservation", 1.5)
    for name, buffer in model.model.drift.named_buffers():
        assert torch.equal(buffer, again.model.drift.get_buffer(name)), name
    assert again.model.drift.events.tolist() == [1, 0]
    fresh = LivingMoeForCausalLM(model.config)
    assert fresh.phase == "stability" and not fresh.model.drift.count.any()


def test_vigilance_below_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="lifecycle.drift_vigilance must be >= 1, got 0.5"):
        LifecycleConfig(drift_vigilance=0.5)
