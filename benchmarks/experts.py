"""How far estimates of what experts contribute can be trusted: rank correlations with leave-one-out.

    living-moe quickstart --output quickstart
    python benchmarks/experts.py quickstart

On held-out text of both of the quickstart's domains, for the graft before it learned the second and after. The figures
in docs/experts.md are of this script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from living_moe import LivingMoeForCausalLM
from living_moe.quickstart import Sizes, read_domains
from living_moe.training.observatory.leaderboard import describe_agreement, describe_text
from living_moe.training.observatory.performance import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of a quickstart on the interpreter's own texts")
    parser.add_argument("--models", nargs="+", default=["living", "living-trained"], help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=32, help="of 128 tokens, per domain (default %(default)s)")
    arguments = parser.parse_args()
    tokenizer, domains = read_domains(None, None, Sizes())
    for name in arguments.models:
        model = LivingMoeForCausalLM.from_pretrained(arguments.directory / name).eval()
        for domain in domains:
            found = measure(model, domain.held_out, tokenizer=tokenizer, max_blocks=arguments.blocks, batch_size=16)
            print(f"\n{name} on {domain.name}: {describe_text(found)}")
            for one in found.agreement:
                print(f"  {describe_agreement(one)}")
            for what in ("contribution", "first_order", "sensitivity"):
                print(f"  sum of every {what}: {sum(getattr(row, what) for row in found.rows):+.3f} nats per token")


if __name__ == "__main__":
    main()
