"""The command line: declares the commands and calls them; `commands/exits.py` tells errors.

0 done, 1 a user's error or a failed check, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Train, explain and serve late-interaction retrievers for page images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Precision = Literal["auto", "fp32", "bf16"]
Target = Literal["colfolio", "colpali-engine", "transformers", "sentence-transformers"]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings as key=value, with dots for nesting.")
]


def run() -> None:
    """Be the process of the command line: `main`, and the end of a rank if it is one."""
    try:
        main()
    except SystemExit as end:
        if "colfolio.distributed" in sys.modules:  # else this process trained nothing
            from colfolio.distributed import end_rank

            end_rank(end.code if isinstance(end.code, int) else 1)
        raise


def main() -> None:
    """Run the command line and exit with its code."""
    from colfolio.commands.exits import errors_told

    # oneDNN, and torch's way to it, keep what they made for 1,024 shapes: hundreds of MiB where
    # every batch has shapes of its own; both read these at the first product
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    with errors_told():
        app()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path(
        "colfolio-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of weights and of the order of the data.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Training steps; the recipe's if unset.")
    ] = None,
) -> None:
    """The whole job on the bundled documents: prepare, train, evaluate, index, search, report."""
    from colfolio.commands.demo import demo_command

    demo_command(out, seed=seed, steps=steps)


@app.command()
def prepare(
    documents: Annotated[Path, typer.Argument(help="Folder of PDFs and images, or one file.")],
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the dataset.")],
    view: Annotated[
        str, typer.Option(help="page: whole pages; strip: headings and lines.")
    ] = "page",
    split: Annotated[
        list[str] | None, typer.Option(help="Only this split; may be given again.")
    ] = None,
) -> None:
    """Make a dataset of documents: queries from their outlines, in the ViDoRe/BEIR layout."""
    from colfolio.commands.prepare import prepare_command

    prepare_command(documents, out, view, split, overrides or [])


@app.command()
def init(
    base: Annotated[str, typer.Argument(help="Hub id, folder with weights, or YAML with a shape.")],
    out: Annotated[Path, typer.Option(help="Folder of the new base.")],
    dim: Annotated[int | None, typer.Option(help="Dimensions of each vector.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    dataset: Annotated[
        str | None, typer.Option(help="Whose training split teaches a shape's tokenizer.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    vision: Annotated[
        str | None, typer.Option(help="Qwen2-VL whose vision tower a text decoder gets.")
    ] = None,
    vision_revision: Annotated[str | None, typer.Option(help="Of that hub id.")] = None,
    scheme: Annotated[
        str | None, typer.Option(help="Positions grafted onto that decoder; qwen2_vl if unset.")
    ] = None,
    generator: Annotated[
        bool, typer.Option("--generator", help="A base that answers in words, with its head.")
    ] = False,
) -> None:
    """Make a base to train from; its projection is drawn at random once and kept."""
    from colfolio.commands.init import init_command

    init_command(
        base,
        out,
        dim=dim,
        seed=seed,
        dataset=dataset,
        revision=revision,
        vision=vision,
        vision_revision=vision_revision,
        scheme=scheme,
        generator=generator,
    )


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="YAML recipe; none with --resume.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    *,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run folder to go on with; settings may change that cost no gradient."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; a GPU if unset.")] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Processes on this host; one a GPU if unset.", min=1)
    ] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Go on although a check before step 1 fails.")
    ] = False,
) -> None:
    """Train from a recipe, or go on with a run; on every GPU of the host."""
    from colfolio.commands.train import resume_command, train_command

    if resume is not None:
        settings = [recipe, *(overrides or [])] if recipe else []
        if not all("=" in setting for setting in settings):
            raise typer.BadParameter("with --resume, give settings alone: the run has its recipe")
        if unchecked:
            raise typer.BadParameter("a run is checked when it begins: leave out --unchecked")
        code = resume_command(resume, settings, device=device, ranks=ranks)
    elif recipe is not None:
        code = train_command(
            Path(recipe), overrides or [], device=device, ranks=ranks, unchecked=unchecked
        )
    else:
        raise typer.BadParameter("give a recipe, or --resume with a run folder")
    if code:
        raise typer.Exit(code)


@app.command()
def check(
    recipe: Annotated[
        str | None, typer.Argument(help="YAML recipe; none with --model.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of any library's model, in place of a recipe."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Say too what rate and batch the gradients ask for.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; a GPU if unset.")] = None,
) -> None:
    """Ask of a recipe, or of a model, what a run would stumble over; exit 1 if a check fails."""
    from colfolio.commands.check import check_command, check_model_command

    if (recipe is None) == (model is None):
        raise typer.BadParameter("give a recipe, or --model with a folder or hub id")
    if recipe is not None:
        passed = check_command(Path(recipe), overrides or [], device=device, measure=measure)
    else:
        assert model is not None
        if measure:
            raise typer.BadParameter("--measure asks of a recipe's batches: give one")
        passed = check_model_command(model, device=device)
    if not passed:
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Overrides = None,
    *,
    gpu: Annotated[
        str | None, typer.Option(help="As h100-80gb or t4-16gb; this machine if unset.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="That share a batch; one a GPU if unset.", min=1)
    ] = None,
) -> None:
    """Say what a recipe takes in memory, time and disk; exit 1 if it does not fit."""
    from colfolio.commands.plan import plan_command

    if not plan_command(recipe, overrides or [], gpu=gpu, ranks=ranks):
        raise typer.Exit(1)


@app.command()
def parts(
    model: Annotated[
        str, typer.Argument(help="Checkpoint, adapter or generator: folder or hub id.")
    ],
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe that is to train it.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show a model by its parts: how large each is, what trains of it, and what that takes."""
    from colfolio.commands.parts import parts_command

    parts_command(model, recipe, overrides or [])


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub id, or index of whole pages.")],
    dataset: Annotated[str, typer.Argument(help="Dataset folder, file or hub id.")],
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    out_json: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    page_score: Annotated[
        str | None, typer.Option(help="Of an index: best view, or union of a page's views.")
    ] = None,
    index_model: Annotated[
        str | None, typer.Option("--model", help="Of an index: where its model is now.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="bf16 where it is native: auto.")] = "fp32",
) -> None:
    """Measure how well queries find what answers them, beside chance and a blind baseline."""
    from colfolio.commands.evaluate import evaluate_command

    evaluate_command(
        *(model, dataset, split),
        out_json=out_json,
        page_score=page_score,
        model=index_model,
        precision=precision,
    )


@app.command()
def diagnose(
    source: Annotated[
        Path, typer.Argument(help="Run folder; or trainer_state.json or CSV, with --loss.")
    ],
    loss: Annotated[
        Literal["pairwise", "info_nce", "infonce", "sigmoid"] | None,
        typer.Option(help="Of another trainer's log: what it minimised."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Of such a log: documents that a query is compared with.", min=1),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of such a log: what scores are divided by.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say why a run does not learn, from its folder or from another trainer's log; exit 1 if so."""
    from colfolio.commands.diagnose import Log, diagnose_command

    log = None
    if loss is not None and batch is not None:
        if temperature is not None and not 0 < temperature < float("inf"):
            raise typer.BadParameter("--temperature is above 0")
        log = Log("info_nce" if loss == "infonce" else loss, batch, temperature)
    elif (loss, batch, temperature) != (None, None, None):
        raise typer.BadParameter("--loss and --batch go together, for another trainer's log")
    if not diagnose_command(source, log, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def positions(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id: Colfolio, transformers, colpali-engine.")
    ],
    image: Annotated[Path | None, typer.Option(help="Ask with this image.")] = None,
    video: Annotated[Path | None, typer.Option(help="Ask with this clip.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Of positions; the family's if unset.")] = None,
) -> None:
    """Say which positions a model really uses; exit 1 if they are wrong."""
    from colfolio.commands.positions import positions_command

    if not positions_command(model, image, video, revision, scheme):
        raise typer.Exit(1)


@app.command()
def index(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    documents: Annotated[str, typer.Argument(help="Folder of documents, or a dataset.")],
    out: Annotated[Path, typer.Option(help="Folder of the index.")],
    views: Annotated[
        str | None, typer.Option(help="page, tiles or strips; the model's own if unset.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a dataset.")] = None,
    dpi: Annotated[float | None, typer.Option(help="Resolution to render PDFs at.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of stored vectors: float16, float32.")] = None,
    store_pages: Annotated[
        bool, typer.Option(help="Keep a small grey image of each page, to show hits on.")
    ] = True,
    max_bad_share: Annotated[
        float, typer.Option(help="Part of the documents that may be unreadable, 0 to 1.")
    ] = 0.01,
    precision: Annotated[Precision, typer.Option(help="bf16 where it is native: auto.")] = "auto",
) -> None:
    """Index the pages of documents, to be searched by what they look like."""
    from colfolio.commands.index import index_command

    index_command(
        *(model, documents, out),
        views=views,
        split=split,
        dpi=dpi,
        dtype=dtype,
        store_pages=store_pages,
        max_bad_share=max_bad_share,
        precision=precision,
    )


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    top_k: Annotated[int, typer.Option(help="Number of hits.")] = 10,
    images: Annotated[
        Path | None, typer.Option(help="Folder for pictures of the hits; ./hits if unset.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the index's model is now.")] = None,
    page_score: Annotated[str, typer.Option(help="best view, or union of views.")] = "best",
) -> None:
    """Search an index; shows file, page and score, and draws the spot that answered."""
    from colfolio.commands.search import search_command

    search_command(index, query, top_k, images_to=images, model=model, page_score=page_score)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Checkpoint or adapter: folder or hub id.")],
    to: Annotated[Target, typer.Option(help="The library that is to read it.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="The base with its adapter in it.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Where an adapter's base is, if not where it says.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Hub id, owner/name, of a repository that gets it.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository a private one.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Of the model's hub id.")] = None,
) -> None:
    """Write a model as the files of another library, and push it if asked."""
    from colfolio.commands.export import export_command

    export_command(
        *(model, to, out),
        adapter=adapter,
        merged=merge,
        base=base,
        push_to=push,
        private=private,
        revision=revision,
    )


if __name__ == "__main__":
    run()
