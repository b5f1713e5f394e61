"""Write what was trained as a folder that transformers loads.

python scripts/export.py runs/quickstart exported/quickstart
python scripts/export.py runs/quickstart exported/plain --plain --dtype bfloat16
python scripts/export.py runs/quickstart exported/quickstart --push owner/name
python scripts/export.py runs/quickstart codes.safetensors --bias prompts.jsonl

SYSTEM is a run folder, or a model as model.path names it. With codes, the folder is
loaded with trust_remote_code=True; --plain leaves them out, and its answers are then
those of the decoder without z. A run's folder has a model card, README.md; --push
owner/name sends the folder to the hub, where you are logged in. --bias writes, for
another engine's logits processor, the codes' biases over the vocabulary and each
prompt's weights of the codes; a line of its file is {"prompt": TEXT or MESSAGES}.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lpc_jax.errors import UserError

if TYPE_CHECKING:
    from lpc_jax.runtime.loading import Origin

REFUSED = 2
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def _shard_bytes(text: str) -> int:
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]B)", text)
    if not matched or not float(matched[1]):
        raise argparse.ArgumentTypeError(
            f"expected a size such as 5GB or 500MB, got {text!r}"
        )
    return int(float(matched[1]) * _UNITS[matched[2]])


def _parser() -> argparse.ArgumentParser:
    from lpc_jax.evaluation import flags
    from lpc_jax.export.folder import DTYPES

    parser = argparse.ArgumentParser(
        prog="export.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_policy(parser)
    parser.add_argument("output", type=Path, help="a folder that is new or empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the stored decoder"
    )
    parser.add_argument(
        "--shard-size", type=_shard_bytes, default="5GB", help="largest file: 5GB"
    )
    parser.add_argument("--plain", action="store_true", help="without the codes")
    parser.add_argument("--push", metavar="OWNER/NAME", help="to the hub, see above")
    parser.add_argument("--private", action="store_true", help="of --push, if new")
    parser.add_argument("--bias", type=Path, metavar="PROMPTS", help="see above")
    parser.add_argument("--like", **flags.LIKE)
    parser.add_argument("--like-by", **flags.LIKE_BY)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exports; returns 0, or 2 for what the user can mend, when nothing was written."""
    arguments = _parser().parse_args(argv)
    try:
        _export(arguments)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def _export(arguments: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from lpc_jax.evaluation import flags
    from lpc_jax.export import folder
    from lpc_jax.files import upload
    from lpc_jax.training import card

    if arguments.like is not None and arguments.bias is None:
        raise UserError(
            f"--like {arguments.like} is of --bias PROMPTS, got none. Name prompts, or"
            " leave it out: an exported folder has all codes."
        )
    if arguments.push is not None and arguments.bias is not None:
        raise UserError(
            f"--push {arguments.push} sends a folder, got --bias, which writes a file."
            " Leave one out."
        )
    output, plain, pushed = arguments.output, arguments.plain, arguments.push
    folder.require_output(output)
    if arguments.bias is not None and output.is_dir():
        raise UserError(f"--bias writes a file, got the folder {output}. Name a file.")
    outline = flags.find_policy(arguments)
    if pushed is not None:
        upload.require_access(pushed, setting="--push", private=arguments.private)
    if arguments.bias is not None:
        _export_bias(arguments, outline)
        return
    folder.require_space(output, outline, dtype=arguments.dtype, plain=plain)
    policy = flags.load_policy(arguments, dtype=jnp.dtype("float32"))
    options = {"dtype": arguments.dtype, "shard_bytes": arguments.shard_size}
    about = card.of(outline, plain=plain)
    folder.write(policy, output, plain=plain, card=about, **options)
    print(folder.summary(policy, output, plain=plain))
    if pushed is not None:
        private = arguments.private
        print(upload.push(output, pushed, private=private, setting="--push"))


def _export_bias(arguments: argparse.Namespace, outline: Origin) -> None:
    import jax.numpy as jnp

    from lpc_jax.evaluation import flags
    from lpc_jax.export import bias
    from lpc_jax.generation import answers, like
    from lpc_jax.runtime import steering

    latent, name, z_of = outline.latent, outline.name, None
    codes = None if latent is None else latent.num_codes
    steering.require_codes(codes, "--bias", name)
    assert latent is not None
    if arguments.like is not None:
        z_of = like.read(arguments.like, arguments.like_by, latent, name)
    prompts = answers.read_prompts(
        str(arguments.bias), outline.tokenizer(), setting="--bias"
    )
    policy = flags.load_policy(arguments, dtype=jnp.dtype("float32"))
    chosen = steering.of_settings(latent) if z_of is None else z_of(policy)
    ids = [prompt.ids for prompt in prompts]
    bias.write(policy, ids, chosen, arguments.output)
    print(f"{arguments.output}: {policy.name}'s codes and {len(prompts)} prompts")


if __name__ == "__main__":
    sys.exit(main())
