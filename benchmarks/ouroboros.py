"""Ouroboros: what selection, Φ and escape give on a chaotic stream, and whether any of it carries over to text.

    python benchmarks/ouroboros.py chaos text [--text FILE] [--seeds 0 1 2 3 4] [--profile small] [--workers 2] [--save]

**chaos**: the next symbol of a ring of coupled logistic maps (`living_moe.training.chaos`) from the last eight, by an
embedding, one mixture layer and a head. The stream is 100,000 map steps long, of 32 trajectories at once, read 20 steps
at a time (small profile: 5,000 optimizer steps; the full one reads 1 step at a time: 100,000). All arms see the same
symbols, start with 8 experts of which 2 serve a token, and have the same hidden size:

- *standard MoE* is Transformers' Mixtral block with its load-balancing loss, *no balance loss* without it;
- *Darwinian router* is the living block without its lifecycle (cosine in a latent space, learned temperature);
- *+ split and death* is the preset `ouroboros`, up to 64 experts;
- *+ Φ trigger* splits, with mutation, when Φ collapses too; in *Φ trigger alone* no vitality is enough for a split;
- *+ Poincaré*, *+ Fourier* have the lifecycle, and may leave for another space when training stagnates and Φ collapses;
- *all* is lifecycle, Φ trigger and the Poincaré ball;
- *standard MoE, final size* has from the start as many experts as the second living arm at the end: equal parameters.

Printed: loss on the 2,000 steps after the stream and on trajectories that were never read, experts over time, splits by
vitality and by Φ, deaths, slab growths (what the seed counts as router rebuilds), escapes, the share of steps spent in
the other space and the largest |gate| to it, parameters, CPU seconds of training. The claim under test is half the loss
of the standard MoE. No learner that sees eight symbols gets below what they leave open, of which a bound is printed.

**text**: small Mixtrals from scratch on text, standard against living with the same presets; Φ is measured, and escapes
are judged, five times as often, as the run is short.

Losses in nats; cells are kept in benchmarks/results/ouroboros.jsonl and not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cell, Result, markdown_table, mean_and_deviation, run_cells, section, text_name
from growth import BATCH, BLOCK, text, train
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from living_moe import LivingMoeConfig, LivingMoeForCausalLM
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.standalone import StandaloneLivingMoe
from living_moe.records import parameter_counts
from living_moe.training.chaos import chaotic_symbols, least_loss
from living_moe.training.evaluation import evaluate_blocks
from living_moe.training.malloc import tune_malloc

RESULTS = Path(__file__).parent / "results"
SYMBOLS, CONTEXT, WIDTH, EXPERTS, TOP_K, MOST = 32, 8, 64, 8, 2, 64
TRAJECTORIES, STREAM, HELD_OUT = 32, 100_000, 2_000
LEARNING_RATE, BALANCE, TEXT_RATE = 3e-3, 0.01, 2e-3
#: What is counted of a life; splits by what asked for them.
EVENTS = {
    "split_vitality": "splits",
    "split_phi": "by Φ",
    "death": "deaths",
    "grow": "slab growths",
    "escape": "escapes",
}
#: Map steps that an optimizer step reads.
PROFILES = {"small": 20, "full": 1}

NO_LIFE: dict[str, Any] = {"lifecycle": {"enabled": False}}
LIFE: dict[str, Any] = {"lifecycle": {"max_experts": MOST}}
PHI: dict[str, Any] = {"lifecycle": {**LIFE["lifecycle"], "phi_trigger": 0.9}}
#: More than any expert's vitality can be.
PHI_ALONE: dict[str, Any] = {"lifecycle": {**PHI["lifecycle"], "split_load": 1e6}}
LIVING: dict[str, dict[str, Any]] = {
    "Darwinian router": NO_LIFE,
    "+ split and death": LIFE,
    "+ Φ trigger": PHI,
    "Φ trigger alone": PHI_ALONE,
    "+ Poincaré": {**LIFE, "escape": {"space": "poincare"}},
    "+ Fourier": {**LIFE, "escape": {"space": "fourier"}},
    "all": {**PHI, "escape": {"space": "poincare"}},
}
STANDARD, UNBALANCED, LARGE = "standard MoE", "standard MoE, no balance loss", "standard MoE, final size"


# -- chaos -------------------------------------------------------------------------------------------------------------


class StandardMoe(nn.Module):
    """Transformers' Mixtral block, and the inputs of its load-balancing loss."""

    def __init__(self, experts: int):
        super().__init__()
        self.config = MixtralConfig(
            hidden_size=WIDTH, intermediate_size=WIDTH, num_local_experts=experts, num_experts_per_tok=TOP_K,
        )  # fmt: skip
        self.config._experts_implementation = "grouped_mm"
        self.block = MixtralSparseMoeBlock(self.config)
        # Outside of a model nobody initialises them: as the living block does.
        nn.init.normal_(self.block.gate.weight, std=WIDTH**-0.5)
        for weight in (self.block.experts.gate_up_proj, self.block.experts.down_proj):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.unsqueeze(0)).squeeze(0)

    def balance_loss(self, x: Tensor) -> Tensor:
        """Switch-Transformer's, over the tokens of a step."""
        probabilities_TE = F.linear(x, self.block.gate.weight).softmax(dim=-1)
        served_E = torch.zeros(probabilities_TE.shape[1]).scatter_add_(
            0, probabilities_TE.topk(TOP_K).indices.flatten(), torch.ones(len(x) * TOP_K)
        )
        return probabilities_TE.shape[1] * (served_E / len(x) * probabilities_TE.mean(dim=0)).sum()


class Predictor(nn.Module):
    """The next symbol from the last CONTEXT ones."""

    def __init__(self, mixture: nn.Module):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH // 4)
        self.mix = nn.Linear(CONTEXT * WIDTH // 4, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.mixture = mixture
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(T, CONTEXT) -> logits (T, SYMBOLS), and what the mixture read (T, WIDTH)."""
        hidden = self.mix(self.embedding(context).flatten(1))
        read = self.norm(hidden)
        return self.head(hidden + self.mixture(read)), read


def mixture_of(cell: Cell) -> nn.Module:
    if cell["arm"] in LIVING:
        return LivingMoeBlock.standalone(WIDTH, WIDTH, EXPERTS, TOP_K, **cell["config"])
    return StandardMoe(cell.get("experts", EXPERTS))


def chaos(cell: Cell) -> Result:
    tune_malloc()
    torch.manual_seed(cell["seed"])
    model = Predictor(mixture_of(cell))
    living = model.mixture if isinstance(model.mixture, StandaloneLivingMoe) else None
    reads = PROFILES[cell["profile"]]
    symbols = stream(cell["seed"], STREAM + HELD_OUT)
    steps = STREAM // reads
    # An escape's own parameters do not decay: they start at the identity, not at zero.
    escaping = [] if living is None or living.block.escape is None else list(living.block.escape.parameters())
    staying = [p for p in model.parameters() if all(p is not other for other in escaping)]
    groups: list[dict[str, Any]] = [{"params": staying}, {"params": escaping, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=LEARNING_RATE, weight_decay=0.01)
    balance = BALANCE if cell["arm"] != UNBALANCED else 0.0
    scheduler = OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    counts: list[float] = []
    gates: list[float] = []
    started = time.process_time()
    for step in range(steps):
        piece = symbols[:, step * reads : (step + 1) * reads + CONTEXT].unfold(1, CONTEXT + 1, 1).flatten(0, 1)
        logits, read = model(piece[:, :-1])
        loss = F.cross_entropy(logits, piece[:, -1])
        total = loss if living is not None else loss + balance * model.mixture.balance_loss(read)  # type: ignore[operator]
        total.backward()
        optimizer.step()
        scheduler.step()
        if living is not None:
            living.lifecycle_step(optimizer, loss=loss.detach())
            counts.append(float(living.num_experts))
            if living.block.escape is not None and living.escape_state() != "closed":
                gates.append(float(living.block.escape.gate.detach().tanh()))
        optimizer.zero_grad()
    seconds = time.process_time() - started
    experts = living.num_experts if living is not None else cell.get("experts", EXPERTS)
    return {
        "ahead": loss_on(model, symbols[:, STREAM:]),
        "loss": loss_on(model, chaotic_symbols(TRAJECTORIES, CONTEXT + HELD_OUT, symbols=SYMBOLS, seed=cell["seed"])),
        **over_time(counts or [float(experts)]),
        "parameters": float(parameters_of(model, living)),
        "train_seconds": seconds,
        **events_of(living),
        "away": len(gates) / steps,
        "gate": max(map(abs, gates), default=0.0),
    }


def events_of(living: Any) -> Result:
    """How many of each kind; splits by what asked for them."""
    events = [] if living is None else list(living.lineage)
    kinds = [event.kind if event.kind != "split" else f"split_{event.metric}" for event in events]
    return {kind: float(kinds.count(kind)) for kind in EVENTS}


def over_time(counts: list[float]) -> Result:
    """Of experts per layer after each step."""
    return {
        "experts_tenth": counts[len(counts) // 10],
        "experts_half": counts[len(counts) // 2],
        "experts": counts[-1],
    }


def parameters_of(model: nn.Module, living: Any) -> int:
    """Spare slots of the living layers in it left out."""
    spare = 0 if living is None else sum(p.numel() for p in living.parameters()) - parameter_counts(living)["total"]
    return sum(p.numel() for p in model.parameters()) - spare


def stream(seed: int, steps: int) -> Tensor:
    """Symbols (TRAJECTORIES, CONTEXT + steps)."""
    return chaotic_symbols(TRAJECTORIES, CONTEXT + steps, symbols=SYMBOLS, seed=1000 + seed)


def least(cell: Cell) -> Result:
    """What CONTEXT symbols leave open of the next, at least, to one who has known these very trajectories for long."""
    seeds = {"ahead": 1000 + cell["seed"], "loss": cell["seed"]}
    return {name: least_loss(CONTEXT, TRAJECTORIES, STREAM, symbols=SYMBOLS, seed=seed) for name, seed in seeds.items()}


@torch.no_grad()
def loss_on(model: Predictor, symbols: Tensor) -> float:
    model.eval()
    pieces = symbols.unfold(1, CONTEXT + 1, 1).flatten(0, 1)
    losses = [F.cross_entropy(model(part[:, :-1])[0], part[:, -1], reduction="sum") for part in pieces.split(4096)]
    return float(torch.stack(losses).sum()) / len(pieces)


def table(rows: list[tuple[Cell, Result]], losses: dict[str, str]) -> str:
    """`losses`: name in the results by title."""
    by_arm = {arm: [r for cell, r in rows if cell["arm"] == arm] for arm in dict.fromkeys(c["arm"] for c, _ in rows)}
    lines = []
    for arm, mine in by_arm.items():
        line = [arm]
        for name in losses.values():
            line.append(mean_and_deviation([r[name] for r in mine]))
            shares = [one[name] / other[name] for one, other in zip(mine, by_arm[STANDARD], strict=True)]
            line.append(mean_and_deviation(shares, 3))
        for name in ("experts_tenth", "experts_half", "experts", *EVENTS):
            line.append(mean_and_deviation([r[name] for r in mine], 1 if name == "escape" else 0))
        if "away" in mine[0]:
            line += [mean_and_deviation([r[name] for r in mine], digits) for name, digits in (("away", 2), ("gate", 3))]
        parameters = statistics.fmean(r["parameters"] for r in mine) / 1e3
        lines.append([*line, f"{parameters:,.0f} k", mean_and_deviation([r["train_seconds"] for r in mine], 0)])
    header = ["arm"]
    for title in losses:
        header += [title, "of the standard's"]
    header += ["experts after a tenth", "after half", "at the end", *EVENTS.values()]
    header += ["of the steps away", "largest gate"] if "away" in rows[0][1] else []
    return markdown_table([*header, "parameters", "CPU seconds"], lines)


# -- text --------------------------------------------------------------------------------------------------------------


def text_model(cell: Cell) -> PreTrainedModel:
    config = MixtralConfig(  # type: ignore[call-arg]
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=cell.get("experts", EXPERTS), num_experts_per_tok=TOP_K,
        max_position_embeddings=BLOCK, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        output_router_logits=cell["arm"] not in LIVING, router_aux_loss_coef=BALANCE,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    if cell["arm"] not in LIVING:
        return MixtralForCausalLM(config)
    config.output_router_logits = False
    return LivingMoeForCausalLM(LivingMoeConfig.from_backbone(config, preset="ouroboros", **cell["config"]))


def sooner(config: dict[str, Any]) -> dict[str, Any]:
    """What is measured and judged over hundreds of steps, in a run that has but a few hundred."""
    sped = {**config, "vitals": {"phi_every": 20}}
    if "escape" in config:
        times = {"window": 40, "max_steps": 200, "leave_steps": 40, "rest_steps": 100}
        sped["escape"] = {**config["escape"], **times}
    return sped


def on_text(cell: Cell) -> Result:
    tune_malloc()
    domain = text(cell["text"])
    torch.manual_seed(cell["seed"])
    model = text_model(cell)
    records, seconds = train(model, domain.train, cell["steps"], cell["seed"], TEXT_RATE)
    living = model if isinstance(model, LivingMoeForCausalLM) else None
    experts = [float(cell.get("experts", EXPERTS))]
    if living is not None:
        experts = [statistics.fmean(record.experts) for record in records]
    return {
        "loss": evaluate_blocks(model, domain.held_out, batch_size=BATCH).loss,
        **over_time(experts),
        "parameters": float(parameters_of(model, living)),
        "train_seconds": seconds,
        **events_of(living),
    }


# -- command line ------------------------------------------------------------------------------------------------------


def cells_of(common: Cell, arms: list[str], seeds: list[int]) -> list[Cell]:
    configs = LIVING if common["experiment"] == "chaos" else {arm: sooner(config) for arm, config in LIVING.items()}
    return [
        {**common, "arm": arm, "seed": seed} | ({"config": configs[arm]} if arm in configs else {})
        for arm in arms
        for seed in seeds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=("chaos", "text"))
    parser.add_argument("--profile", choices=PROFILES, default="small")
    parser.add_argument("--text", help="text file; default: Python's documentation")
    parser.add_argument("--steps", type=int, default=400, help="text: optimizer steps of 16 x 128 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/ouroboros.md")
    options = parser.parse_args()
    path, parts = RESULTS / "ouroboros.jsonl", []
    for experiment in options.experiments:
        common: Cell = {"experiment": experiment}
        if experiment == "chaos":
            common |= {"profile": options.profile}
            function, arms = chaos, [STANDARD, UNBALANCED, *LIVING]
            reads = PROFILES[options.profile]
            open_ = run_cells([{"least": CONTEXT, "seed": seed} for seed in options.seeds], least, path)
            ahead, new = (statistics.fmean(result[name] for _, result in open_) for name in ("ahead", "loss"))
            losses = {"loss ahead": "ahead", "loss on new trajectories": "loss"}
            what = (
                f"{STREAM:,} map steps of {TRAJECTORIES} trajectories, {reads} at a time. {CONTEXT} symbols leave "
                f"open of the next at least {ahead:.3f} nats on these trajectories, {new:.3f} on the new ones"
            )
        else:
            common |= {"text": options.text, "steps": options.steps}
            losses = {"held-out loss": "loss"}
            function, arms = on_text, [STANDARD, "Darwinian router", "+ split and death", "all"]
            what = f"Text: {text_name(options.text)}. {options.steps} steps of {BATCH} x {BLOCK} tokens"
        rows = run_cells(cells_of(common, arms, options.seeds), function, path, workers=options.workers)
        grown = [result["experts"] for cell, result in rows if cell["arm"] == "+ split and death"]
        large = {**common, "experts": round(statistics.fmean(grown))}
        rows += run_cells(cells_of(large, [LARGE], options.seeds), function, path, workers=options.workers)
        parts.append(section(experiment, what, options.seeds, table(rows, losses)))
        print(parts[-1], flush=True)
    if options.save:
        (RESULTS / "ouroboros.md").write_text("# Ouroboros\n\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
