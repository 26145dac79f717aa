"""Complete the prompts of JSON Lines or Parquet files with Ray, and write Parquet.

    python examples/ray_batch.py prompts.jsonl answers/ --model PATH_OR_ID
    python examples/ray_batch.py prompts/ answers/ --model PATH_OR_ID --engines 8 --batch-size 4096 --max-tokens 512
    python examples/ray_batch.py prompts/ answers/ --model PATH_OR_ID --resume-by id

Each row has a `prompt` (text, or token ids) or `messages` (as for a chat), and may have `sampling_params`. The output has
all columns of the input and those that nanovllm.ray adds: generated_text, generated_tokens, finish_reason,
num_prompt_tokens, num_generated_tokens, and error, which says why a row could not be run.

It joins the Ray cluster that it is started on (RAY_ADDRESS), else it uses this machine. docs/scaling.md says more.
"""

import argparse
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as pads
import ray
import ray.data
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
from ray.data import SaveMode
from ray.data.checkpoint import CheckpointConfig

from nanovllm import SamplingParams
from nanovllm.ray import generate


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help=".jsonl or .parquet file, or a folder of such; a path or a URI (s3://...)")
    parser.add_argument("output", help="folder for Parquet files, a new one")
    parser.add_argument("--model", required=True, help="checkpoint's folder, there on all machines, or id on the hub")
    parser.add_argument("--resume-by", metavar="COLUMN", help="whose values all differ: what is done is kept in "
                        "OUTPUT.checkpoint, and the same command, started again, goes on")  # fmt: skip
    engines = parser.add_argument_group("engines")
    add = engines.add_argument
    add("--engines", type=int, default=1, help="processes, each with a model (default: 1)")
    add("--gpus-per-engine", type=float, metavar="N", help="default: tensor parallel size, 0 where there are no GPUs")
    add("--cpus-per-engine", type=float, metavar="N", help="default: 1; leave one or two to Ray")
    add("--tensor-parallel-size", type=int, metavar="N", default=1, help="GPUs that share one model (default: 1)")
    add("--batch-size", type=int, metavar="ROWS", help="an engine's at a time (default: 8 * max-num-seqs)")
    add("--max-num-seqs", type=int, metavar="ROWS", default=512, help="that run at once in an engine (default: 512)")
    add("--max-model-len", type=int, metavar="TOKENS", help="prompt and answer together (default: 4096)")
    add("--kvcache-memory-gb", type=float, metavar="GB", help="an engine's; set it where CPU engines share a machine")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=1.0, help="default: 1.0; 0 is greedy")
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--max-tokens", type=int, default=256, help="of an answer (default: 256)")
    sampling.add_argument("--seed", type=int, help="makes answers a function of it and of the row")
    return parser.parse_args()


def read(path: str) -> ray.data.Dataset:
    """The rows of a file, or of the files of a folder."""
    files, name = FileSystem.from_uri(path) if "://" in path else (LocalFileSystem(), path)
    is_folder = files.get_file_info(name).type == FileType.Directory
    names = [file.path for file in files.get_file_info(FileSelector(name))] if is_folder else [name]
    parquet = any(one.endswith(".parquet") for one in names)
    return ray.data.read_parquet(path) if parquet else ray.data.read_json(path)


def complete(args: argparse.Namespace) -> None:
    """Read, generate, write. It streams: rows are written batch by batch."""
    context = ray.data.DataContext.get_current()
    context.retried_map_errors, context.max_map_retries = True, 2  # for an engine that fails; one that dies is restarted
    if args.resume_by:
        context.checkpoint_config = CheckpointConfig(
            id_column=args.resume_by,
            checkpoint_path=args.output.rstrip("/") + ".checkpoint",
            delete_checkpoint_on_success=False,  # so that more rows can be added to the input later
        )
    dataset = generate(
        read(args.input),
        args.model,
        SamplingParams(temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens),
        engines=args.engines,
        gpus_per_engine=args.gpus_per_engine,
        cpus_per_engine=args.cpus_per_engine,
        batch_size=args.batch_size,
        seed=args.seed,
        tensor_parallel_size=args.tensor_parallel_size,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        kvcache_memory_gb=args.kvcache_memory_gb,
    )
    dataset.write_parquet(args.output, mode=SaveMode.APPEND if args.resume_by else SaveMode.ERROR)


def count(output: str) -> tuple[int, int, int]:
    """Rows, rows with an error, and generated tokens of what was written."""
    rows = errors = tokens = 0
    for batch in pads.dataset(output).to_batches(columns=["error", "num_generated_tokens"]):
        rows += batch.num_rows
        errors += batch.num_rows - batch["error"].null_count
        tokens += pc.sum(batch["num_generated_tokens"]).as_py() or 0
    return rows, errors, tokens


def main() -> None:
    """Complete the prompts and say what came of it."""
    args = parse_args()
    if not args.resume_by and Path(args.output).exists():
        sys.exit(f"{args.output} is there already: choose another, or --resume-by a column whose values are unique")
    start = time.perf_counter()
    complete(args)
    seconds = time.perf_counter() - start
    rows, errors, tokens = count(args.output)
    print(f"{args.output}: {rows} rows, {errors} with an error; {tokens} tokens generated. This run took {seconds:.0f} s")


if __name__ == "__main__":
    main()
