"""One domain's score as a program: token ids and mask of prompts in, logits out (Uni-CTR).

The file holds the encoder with its LoRA merged, and the domain's head, or the general network
where it has none. `torch.export.load(FILE).module()` runs it: ids [n, T] int64 with each prompt
padded at its right, mask [n, T] bool, true on tokens.

Example: python -m launch export runs/amazon_unictr beauty --out beauty.pt2
"""

import argparse
from pathlib import Path

from data_shards import UserError
from launch.progress import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("domain")
    parser.add_argument("--out", type=Path, required=True, help="a name that ends in .pt2")


def run(args: argparse.Namespace) -> None:
    import torch

    from launch.group import joined
    from models import UniCTR
    from models.export import exported
    from trainer.model import with_adapters
    from trainer.run_folder import RunFolder

    if args.out.suffix != ".pt2" or not args.out.parent.is_dir():
        raise UserError(f"{args.out}: expected a name that ends in .pt2, in a folder that is there")
    config, folder = RunFolder.config(args.run_folder), RunFolder(args.run_folder)
    with joined() as ranks:
        trunk = folder.load_trunk(config, ranks)
        kept = folder.kept_adapters(trunk, trunk.fingerprint())
        mine = [adapter for adapter in kept if adapter.domain == args.domain]
        method = with_adapters(trunk, mine).dense
        if not isinstance(method, UniCTR):
            raise UserError(
                f"{args.run_folder}: method {config.method.name} reads tables; programs are of "
                'prompts alone, so of a run with method.name = "unictr"'
            )
        torch.export.save(exported(method, args.domain), args.out)
    by = "its own head" if mine else "the general network, for it has no adapter"
    say(f"{args.out}: {args.domain}, scored by {by}")
