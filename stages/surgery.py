"""Make a model of models: merged with its adapter, deeper, with another vocabulary, or averaged.

tritium surgery merge ADAPTER OUT                              # a run, a checkpoint or a peft folder, into its base
tritium surgery similarity MODEL --text=book.txt --span=4      # which layers change little
tritium surgery layers MODEL OUT --order=0-23,8-31             # depth up-scaling by duplication
tritium surgery vocabulary MODEL OUT --text=book.txt           # what the text uses, of the tokenizer too
tritium surgery vocabulary MODEL OUT --size=32064              # cut at its end, or longer
tritium surgery average OUT MODEL MODEL … [--weights=1,2] [--ema=0.5] [--fisher=book.txt]

An adapter that was trained on an NF4 base is added to what the codes stand for: to no other weights is it the same
model (peft issue 2321). The largest difference that rounding makes, of a weight and of a logit, is told.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tritium.core.checkpoint import checkpoints, model_folder
from tritium.core.config import UserError
from tritium.core.files import Skipped, read_documents
from tritium.core.output import make_folder
from tritium.core.setup import DTYPES, load_model, load_tokenizer, read_model
from tritium.core.tokenizer import Tokenizer
from tritium.core.tokenizer.pruning import prune
from tritium.model import lora
from tritium.model.adapters import base_folder
from tritium.model.heads import ScalarModel
from tritium.model.hf import ADAPTER_CONFIG, read_json
from tritium.model.surgery import averaged, ema_weights, fisher, layer_similarities, with_layers, with_vocabulary
from tritium.model.transformer import Transformer
from tritium.parallel.files import tensor_files
from tritium.parallel.mesh import Mesh
from tritium.stages.cli import run_stage

DOCUMENTS = 32  # that similarity and Fisher information are measured on


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked. Raises: UserError for what can't be."""
    arguments = parser().parse_args(argv)
    if "out" in arguments:
        arguments.out = new_folder(arguments.out)  # before the work; made when there is a model to write
    try:
        arguments.run(arguments)
    except ValueError as error:
        raise UserError(str(error)) from None
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tritium surgery", description=__doc__.partition("\n")[0])
    kinds = made.add_subparsers(required=True, metavar="merge|similarity|layers|vocabulary|average")

    def command(run: Callable, text: str, *folders: str, dtype: str = "fp32") -> argparse.ArgumentParser:
        kind = kinds.add_parser(run.__name__, help=text)
        for folder in folders:
            kind.add_argument(folder, help="folder to write" if folder == "out" else f"folder or run of the {folder}")
        kind.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"of the weights (default: {dtype})")
        kind.set_defaults(run=run)
        return kind

    command(merge, "merge an adapter into its base", "adapter", "out", dtype="bf16")
    kind = command(similarity, "cosine similarity between what enters some layers and what leaves them", "model")
    kind.add_argument("--text", required=True, help="file of text")
    kind.add_argument("--span", type=int, default=1, help="how many layers are looked at together (default: 1)")
    kind = command(layers, "copy layers in another order, some of them twice", "model", "out")
    kind.add_argument("--order", required=True, help="such as 0-23,8-31")
    kind = command(vocabulary, "drop tokens that a text does not use, or cut or add some at the end", "model", "out")
    kind.add_argument("--text", default="", help="file: keep the tokens that it uses; the tokenizer is pruned too")
    kind.add_argument("--size", type=int, default=0, help="tokens of the new model")
    kind = command(average, "average the weights of models of one shape, the newest last", "out")
    kind.add_argument("models", nargs="+", metavar="model", help="folders or runs of the models")
    kind.add_argument("--weights", default="", help="one for each model (default: equal ones)")
    kind.add_argument("--ema", type=float, help="decay of an exponential moving average over the models")
    kind.add_argument("--fisher", default="", metavar="TEXT", help="weigh each parameter by its Fisher information")
    return made


def merge(arguments: argparse.Namespace) -> None:
    """Write the plain model, with the tokenizer's files, and say how exact it is."""
    source, out = Path(model_folder(arguments.adapter)), arguments.out
    if not (source / ADAPTER_CONFIG).exists():
        why = f"there is no {ADAPTER_CONFIG}" if source.is_dir() else "there is no such folder"
        raise UserError(f"{source} holds no adapter: {why}")
    model = read_model(str(source), arguments.dtype, Mesh.single())
    before = probe(model)
    try:
        rounding = lora.merge(model)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    try:
        tokenizer = load_tokenizer(str(source))
    except UserError:  # of peft's folders, many have none
        tokenizer = load_tokenizer(str(base_folder(source, read_json(source / ADAPTER_CONFIG))))
    model.save(str(out))
    tokenizer.save(out)
    print(f"{out}: largest rounding of a weight {rounding:.3g}, of a logit {(probe(model) - before).abs().max():.3g}")


@torch.no_grad()
def probe(model: Transformer | ScalarModel) -> torch.Tensor:
    """Outputs on a few tokens, to compare."""
    count = min(64, model.config.max_positions, model.config.vocab_size)
    tokens = torch.linspace(0, model.config.vocab_size - 1, count).long()
    return (model.logits if isinstance(model, Transformer) else model.values)(tokens).float()


def similarity(arguments: argparse.Namespace) -> None:
    model = opened(arguments.model, arguments.dtype)
    if not 1 <= arguments.span <= model.config.num_layers:
        raise UserError(f"--span={arguments.span}: the model has {model.config.num_layers} layers")
    documents = texts(arguments.text, arguments.model, model)
    rows = torch.stack([layer_similarities(model, tokens, span=arguments.span) for tokens in documents]).mean(0)
    for i, value in enumerate(rows.tolist()):
        mark = "  ← changes least" if i == int(rows.argmax()) else ""
        last = f"-{i + arguments.span - 1}" if arguments.span > 1 else ""
        print(f"layer{'s' if last else ''} {i}{last}  {value:.4f}{mark}")


def layers(arguments: argparse.Namespace) -> None:
    order: list[int] = []
    for part in arguments.order.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise UserError(f"--order={arguments.order}: {part!r} is neither a layer nor a range such as 8-31")
        order += range(int(first), int(last or first) + 1)
    model = opened(arguments.model, arguments.dtype)
    write(with_layers(model, order), arguments.out, load_tokenizer(arguments.model))


def vocabulary(arguments: argparse.Namespace) -> None:
    model = opened(arguments.model, arguments.dtype)
    tokenizer = load_tokenizer(arguments.model, model)
    kept = range(min(arguments.size, model.config.vocab_size))
    if arguments.text:
        documents = read_documents(arguments.text, skipped := Skipped())
        tokenizer, kept = prune(tokenizer, {i for text in documents for i in tokenizer.encode(text)})
        skipped.tell()
    size = max(arguments.size, len(kept)) if arguments.text else arguments.size
    if size < tokenizer.vocab_size:
        raise UserError(f"--size={size}: the tokenizer has {tokenizer.vocab_size} tokens")
    write(with_vocabulary(model, kept, size - len(kept)), arguments.out, tokenizer)


def average(arguments: argparse.Namespace) -> None:
    if arguments.weights and arguments.ema is not None:
        raise UserError("--weights and --ema: one of them says how much each model counts")
    models = [opened(model, arguments.dtype) for model in arguments.models]
    try:
        weights = [float(w) for w in arguments.weights.split(",")] if arguments.weights else [1.0] * len(models)
    except ValueError:
        raise UserError(f"--weights={arguments.weights} are not numbers") from None
    if arguments.ema is not None:
        weights = ema_weights(len(models), arguments.ema)
    fishers = []
    for model, name in zip(models, arguments.models, strict=True) if arguments.fisher else ():
        fishers.append(fisher(model, texts(arguments.fisher, name, model)))
    write(averaged(models, weights, fishers), arguments.out, load_tokenizer(arguments.models[0]))


def opened(folder: str, dtype: str) -> Transformer:
    """Raises: UserError for an adapter, which the new model would be without."""
    if (Path(model_folder(folder)) / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{folder} is an adapter: make one model of it and its base first, with `tritium surgery merge`"
        )
    return load_model(folder, dtype, Mesh.single())


def texts(file: str, folder: str, model: Transformer) -> list[torch.Tensor]:
    """The first documents of a file, cut to the model's context."""
    tokenizer, size, pieces, skipped = load_tokenizer(folder), model.config.max_positions, [], Skipped()
    for text in read_documents(file, skipped):
        ids = tokenizer.encode(text[: 8 * DOCUMENTS * size])
        pieces += [piece for piece in torch.tensor(ids).split(size) if len(piece) > 1]
        if len(pieces) >= DOCUMENTS:
            break
    skipped.tell()
    if not pieces:
        raise UserError(f"{file} has no text")
    return pieces[:DOCUMENTS]


def new_folder(out: str) -> Path:
    """Raises: UserError where a model is there already, or nothing can be written."""
    folder = make_folder(out, "OUT", now=False)
    if tensor_files(folder, "model") or checkpoints(folder):  # those of a run would be hidden by it
        raise UserError(f"OUT={folder} holds a model already: name another folder, or delete it")
    return folder


def write(model: Transformer, folder: Path, tokenizer: Tokenizer) -> None:
    """The model's folder, with its tokenizer."""
    model.save(str(folder))
    tokenizer.save(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    raise SystemExit(run_stage("surgery"))
