#!/usr/bin/env python
r"""Evaluate a checkpoint on long text, offline: needles, RULER, perplexity by position, and questions from files.

    python launch/eval.py runs/first --tasks needle,perplexity --lengths 4Ki,32Ki
    python launch/eval.py runs/first --tasks ruler,mr_niah --lengths 4Ki,128Ki,1Mi --samples 50 --out results
    python launch/eval.py runs/first --tasks choices,longbench_v2 --choices-file q.jsonl --longbench-file data.json
    python launch/eval.py runs/seeing --tasks images --images drawn/valid_questions.jsonl
    torchrun --nproc-per-node 8 launch/eval.py runs/first --tasks ruler --lengths 1Mi --cp 8

Tasks: needle, mr_niah, perplexity; RULER's niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue,
niah_multiquery, vt, cwe, fwe, and from files qa_1 (SQuAD) and qa_2 (HotpotQA); single, multi, multi_key and
variable_tracking, which training evaluates; choices, longbench_v2, mtob_ek, mtob_ke, images from files. Groups:
niah_single, niah_multikey, niah, ruler, needles (training's). A sample has exactly as many tokens as --lengths says,
its answer included; no context is ever cut. Text around needles, and of perplexity, is the held-out part of the run's
corpus, or of --corpus.

Writes eval-CHECKPOINT-HASH.json, .txt and .png into RUN/evals or --out, which launch/report.py shows. Each sample is
written down when it is done: the same command goes on where it was stopped. docs/evaluation.md says what each task is.

Progress and errors go to standard error, tables to standard output. The exit code is 0, 2 for bad input, or 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.command_line import Parser, exit_code
from mmtrain.config.telling import told_once
from mmtrain.infer.command import add_engine_options, add_image_options

if TYPE_CHECKING:
    from mmtrain.evals.offline.evaluation import Evaluation
    from mmtrain.evals.offline.request import EvalRequest
    from mmtrain.infer.engine import Engine

FILES = {"longbench_v2": "longbench_file", "choices": "choices_file", "mtob_ek": "mtob_folder",
         "mtob_ke": "mtob_folder", "qa_1": "squad_file", "qa_2": "hotpotqa_file", "images": "images"}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="tasks and groups, with commas between them")
    parser.add_argument("--lengths", metavar="TOKENS", help="of a sample with its answer, such as 4Ki,128Ki,1Mi")
    parser.add_argument("--samples", type=int, default=10, help="of each task and length (default %(default)s)")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="samples take them in turn (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default %(default)s)")
    parser.add_argument("--corpus", metavar="DIR", help="held-out text (default: of the run's first corpus)")
    parser.add_argument("--choices-file", type=Path, metavar="FILE", help="questions with choices, JSON lines")
    parser.add_argument("--longbench-file", type=Path, metavar="FILE", help="LongBench v2's data.json")
    parser.add_argument("--squad-file", type=Path, metavar="FILE", help="SQuAD's JSON, for qa_1")
    parser.add_argument("--hotpotqa-file", type=Path, metavar="FILE", help="HotpotQA's JSON, for qa_2")
    parser.add_argument("--mtob-folder", type=Path, metavar="DIR", help="MTOB's files, for mtob_ek and mtob_ke")
    parser.add_argument("--mtob-book", default="full", metavar="BOOK", help="none, medium, long, full, or a text file")
    parser.add_argument("--images", type=Path, metavar="FILE", help="questions on images, JSON lines")
    parser.add_argument("--answer-tokens", type=int, default=32, help="of an answer on images (default %(default)s)")
    parser.add_argument("--choices-by", choices=("text", "letter"), default="text",
                        help="what is scored of the choices of questions on images (default %(default)s)")  # fmt: skip
    add_image_options(parser)
    parser.add_argument("--max-length", metavar="TOKENS", help="refuse samples of files that are longer")
    parser.add_argument("--leave-out-longer", action="store_true", help="leave them out and count them instead")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: RUN/evals)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_engine_options(parser, "samples", 8)
    return parser.parse_args(argv)


def request_of(options: argparse.Namespace) -> EvalRequest:
    """Make the request of a command line.

    Raises:
        ConfigError: the first thing that is wrong in it.
    """
    from mmtrain.config.schema import parse_count
    from mmtrain.evals.offline.request import EvalRequest, parse_depths, parse_lengths, parse_tasks

    files = {task: path for task, name in FILES.items() if (path := getattr(options, name)) is not None}
    limit = None if options.max_length is None else parse_count(options.max_length, "--max-length")
    tasks = parse_tasks(options.tasks, list(files))
    request = EvalRequest(
        tasks, parse_lengths(options.lengths), options.samples, options.seed, parse_depths(options.depths),
        tuple((task, path) for task, path in files.items() if task in tasks), options.mtob_book, limit,
        options.leave_out_longer, options.answer_tokens, options.choices_by,
    )  # fmt: skip
    request.validate()
    return request


def run(options: argparse.Namespace) -> None:
    """Check everything that can be checked without the weights, read them, ask, and write the results.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    from mmtrain.infer.command import check_engine_options, engine_options, open_asked, turns_of

    request = request_of(options)
    check_engine_options(options)
    from mmtrain.evals.offline.evaluation import Evaluation  # from here on with torch
    from mmtrain.infer.answering import options_for
    from mmtrain.infer.run_tokenizer import identity_of_checkpoint

    with open_asked(options) as opened:
        checkpoint = opened.checkpoint
        evaluation = Evaluation(
            request, checkpoint.path, checkpoint.model, checkpoint.tokenizer, identity_of_checkpoint(checkpoint.path),
            options.corpus, options.precision, turns_of(options, checkpoint.path),
        )  # fmt: skip
        folder = evaluation.folder(options.out)
        if opened.ranks.rank == 0:
            _announce(options, request, evaluation, f"{checkpoint.path} on {opened.place}")
        sizes = engine_options(options, options_for(evaluation.longest, options.max_running))
        opened.run(sizes, lambda engine: ask(options, engine, evaluation, folder, opened.place))


def _announce(options: argparse.Namespace, request: EvalRequest, evaluation: Evaluation, where: str) -> None:
    """Tell what will be asked, and what is left out."""
    _say(options, f"{where}: {evaluation.line()}")
    if "ruler" in options.tasks.split(",") and not {"qa_1", "qa_2"} <= set(request.tasks):
        _say(options, "note: RULER's qa_1 and qa_2 need their files: --squad-file, --hotpotqa-file")
    if any(unit.depth is not None for unit in evaluation.units) and (never := request.depths[request.samples :]):
        _say(options, f"note: {request.samples} samples leave out depths {', '.join(f'{depth:g}' for depth in never)}")


def ask(options: argparse.Namespace, engine: Engine, evaluation: Evaluation, folder: Path, where: str) -> None:
    """Ask all samples, and write the results.

    Raises:
        ConfigError: a sample does not fit into memory, or the weights give no finite logits.
    """
    from mmtrain.infer.answering import EngineAnswerer

    answerer = EngineAnswerer(engine)
    answerer.check(evaluation.longest)
    began = time.perf_counter()
    result, written = evaluation.run(answerer, folder, options.max_running, _progress(options, evaluation), where)
    _tell(result, written, time.perf_counter() - began)


def _progress(options: argparse.Namespace, evaluation: Any) -> Any:
    """What is told of each sample that is done: a line for the last one of a task and length."""
    from mmtrain.evals.offline.progress import Progress

    return Progress(evaluation.units, lambda line: _say(options, line)).done


def _say(options: argparse.Namespace, line: str) -> None:
    if not options.quiet:
        print(line, file=sys.stderr, flush=True)


def _tell(result: dict[str, Any], written: list[Path], seconds: float) -> None:
    from mmtrain.evals.offline.table import headline, tables

    print(tables(result))
    print(f"{headline(result)} ({seconds:.1f} s): {', '.join(map(str, written))}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    options = parse(argv)
    told = "stopped: the same command goes on where it was"
    return exit_code(lambda: told_once(lambda: run(options)), lambda: print(told, file=sys.stderr, flush=True))


if __name__ == "__main__":
    sys.exit(main())
