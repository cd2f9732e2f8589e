"""What `--help` prints. Built from the YAML folders and the exit codes, so that it cannot promise what is not there."""

from wrinklefree.composition import groups
from wrinklefree.data.config import FilterConfig

COMMANDS = {
    "train": "train a stage, or all of them (scripts/train.py)",
    "convert": "write a GGUF file (scripts/convert_to_gguf.py)",
    "export": "write a folder that transformers loads (scripts/export_hf.py)",
    "serve": "serve a model over HTTP, with a chat page (scripts/serve.py)",
    "generate": "continue a prompt, or chat in the terminal (scripts/generate.py)",
    "benchmark": "search for efficient settings (scripts/run_benchmark.py)",
    "evaluate": "score a checkpoint, or compare two (scripts/run_evaluation.py)",
    "prepare": "filter, deduplicate and tokenize text once (scripts/prepare_data.py)",
    "inspect": "show packed rows as text (scripts/inspect_data.py)",
    "cache": "keep a teacher's largest logits for stage 3 (scripts/cache_teacher.py)",
    "study": "run, resume or report a study of many arms (scripts/run_study.py)",
    "doctor": "what is here and what is missing on this machine (scripts/doctor.py)",
}

STAGES = {
    "bitdistill": "all of the below in order, with controls and a table (the default)",
    "stage1_subln": "stage 1: insert SubLN and BitLinear, calibrate; no training",
    "stage1_9_layerwise": "stage 1.9: align hidden states with the base model",
    "stage2_pretrain": "stage 2: continue pretraining, ternary",
    "stage3_distill": "stage 3: distil on a task",
    "stage3_distill_smollm2": "stage 3 for a small model: 8 rows, teacher resident",
    "fp_pretrain": "full-precision pretraining (from scratch, or the control)",
    "fp_sft": "full-precision fine-tuning on a task (stage 3's teacher)",
    "bitnet_sft": "ternary fine-tuning with cross-entropy alone (the baseline)",
}

OVERRIDES = {
    "training.lr=5e-5": "learning rate, in AdamW's meaning for every optimizer",
    "training.batch_size=4": "rows a micro-batch; training.gradient_accumulation_steps=8 beside it",
    "training.max_seq_length=512": "tokens a row",
    "training.total_tokens=1000000": "length of a run; or training.max_steps=..., training.epochs=...",
    "training.init_from=PATH": "start from this artifact instead of the one found by lineage",
    "optimizer.type=adamw": "auto, adamw, adamw_8bit, muon, apollo, apollo_mini",
    "data.task=sst2": "task of data=downstream",
    "data.sources.0.path=PATH": "text file, folder or glob of data=local",
    "model.source=package": "weights from a package registry instead of the hub",
    "subln.placement=output": "none, output, per_projection",
    "seed=1  seeds=3": "one seed; or so many of them, for the table's intervals",
    "output_dir=PATH": "where runs are written (outputs)",
    "dry_run=true": "compose, resolve inputs, print the plan, stop",
    "estimate=true": "print memory, traffic, time and price, stop; estimation.device=h100_80gb estimation.devices=64",
    "skip_recovery=true": "start fresh: neither skip a complete run nor resume an interrupted one",
    "allow_slow=true": "run although the estimate is above 24 hours",
}

HYDRA_FLAGS = {
    "--cfg job": "print the composed configuration and stop",
    "-m, --multirun": "one run for each combination: -m training.lr=1e-5,5e-5",
    "--hydra-help": "the other flags; hydra.*=... sets Hydra's own keys",
}

EXIT_CODES = {
    0: "done",
    1: "a defect of wrinklefree (traceback)",
    2: "configuration",
    65: "data",
    69: "network or a service",
    74: "input or output",
    75: "out of memory",
    76: "non-finite loss",
    77: "credentials",
    78: "checkpoint",
    130: "interrupted",
    143: "terminated",
}


def command_help() -> str:
    """Return the help of `wrinklefree`."""
    return "\n".join(
        [
            "usage: wrinklefree COMMAND ...",
            "",
            *_table("commands", COMMANDS),
            "wrinklefree COMMAND --help says more.",
        ]
    )


def train_help() -> str:
    """Return the help of `scripts/train.py` and `wrinklefree train`."""
    found = groups()
    stages = {name: STAGES.get(name, "") for name in sorted(found["training"], key=_stage_order)}
    others = {
        f"{name}=": " | ".join(options)
        for name, options in found.items()
        if name not in {"training", "recipe"} and options
    }
    return "\n".join(
        [
            "usage: train.py [GROUP=OPTION ...] [KEY=VALUE ...] [FLAGS]",
            "",
            "Turns a pretrained language model into a ternary one. Without arguments: all stages on the tiny model.",
            "",
            *_table("stages (training=)", stages),
            *_table("groups", others),
            *_table("common overrides", OVERRIDES),
            *_table("flags", HYDRA_FLAGS),
            *_table("exit codes", {str(code): meaning for code, meaning in EXIT_CODES.items()}),
        ]
    ).rstrip()


EVALUATION_KEYS = {
    "checkpoint=PATH": "an artifact, a stage's folder, a Hugging Face folder, a GGUF file, or base (the model= itself)",
    "compare=PATH": "a second checkpoint: paired differences (the first minus the second)",
    "tasks=[text,recall]": "text (bits per byte of data=, perplexity), task names, lm_eval:NAME",
    "split=validation": "instead of test",
    "max_tokens=50000": "held-out tokens of text",
    "max_examples=500": "examples of each task, spread evenly; null: all",
    "max_seq_length=512": "tokens a row; null: 512, or the model's context if shorter",
    "max_new_tokens=64": "length of generated responses",
    "output=FILE": "where the JSON goes (evaluation.json in output_dir)",
    "lm_eval_tasks=FOLDER": "local task files for lm_eval:NAME",
    "model=NAME data=NAME": "as for train.py: the model of checkpoint=base, the text of bits per byte",
}

PREPARE_KEYS = {
    "output=FOLDER": "gets a folder of tokens for each source; prints how to train on them",
    "data=NAME model=NAME": "as for train.py: what to read (data=packaged), and whose tokenizer",
    "data.num_workers=4": "processes that tokenize",
    "deduplicate=near": "none, exact (the default), or near too (MinHash; needs the extra dedup)",
    "near_threshold=0.8": "share of common phrases from which two documents are the same",
    "filters.NAME=LIMIT": "a quality filter's limit, see below; null: off",
    "max_documents=1000000": "read no more of each source",
    "max_tokens=1000000000": "write no more of each source",
    "held_out_documents=10000": "texts kept of each of validation and test",
    "verify=FOLDER": "only check a prepared folder, every file's SHA-256",
}

INSPECT_KEYS = {
    "rows=3": "rows to show",
    "skip=0": "rows to pass over first",
    "tokenizer=FOLDER": "instead of that of model=: an artifact's, for example",
    "data=NAME packing.packer=best_fit ...": "everything else as for train.py (training=fp_pretrain data=packaged)",
}

STUDY_KEYS = {
    "study=NAME": "a file of configs/study",
    "threads=1": "CPU threads of torch",
    "arms=[NAME,...]": "run only these arms and what they are made of",
    "dry_run=true, --dry-run": "list the cells with tokens and estimated time, run nothing",
    "report=true": "run nothing, write the section and plots from the rows that are there",
    "document=FILE": "with report: replace the study's section between its markers in FILE",
    "output_dir=PATH": "where runs, rows and plots are written (outputs)",
    "seeds=[0,1]": "override a key of the study's own",
}


def evaluate_help() -> str:
    """Return the help of `scripts/run_evaluation.py`."""
    return "\n".join(
        [
            "usage: run_evaluation.py checkpoint=PATH [KEY=VALUE ...]",
            "",
            "Scores a checkpoint at lambda = 1 and full SubLN strength, with 95% bootstrap intervals.",
            "",
            *_table("keys", EVALUATION_KEYS),
        ]
    ).rstrip()


def prepare_help() -> str:
    """Return the help of `scripts/prepare_data.py`."""
    filters = {
        f"filters.{name}={'null' if field.default is None else field.default}": " ".join(
            (field.description or "").split()
        )
        for name, field in FilterConfig.model_fields.items()
    }
    return "\n".join(
        [
            "usage: prepare_data.py output=FOLDER [KEY=VALUE ...]",
            "",
            "Filters, deduplicates and tokenizes text once, into memory-mapped shards that data=tokens reads.",
            "",
            *_table("keys", PREPARE_KEYS),
            *_table("filters and their limits", filters),
        ]
    ).rstrip()


def inspect_help() -> str:
    """Return the help of `scripts/inspect_data.py`."""
    return "\n".join(
        [
            "usage: inspect_data.py [KEY=VALUE ...]",
            "",
            "Shows packed rows as text: documents and their borders, and in \u2039marks\u203a what is no target.",
            "",
            *_table("keys", INSPECT_KEYS),
        ]
    ).rstrip()


def study_help() -> str:
    """Return the help of `scripts/run_study.py`."""
    from wrinklefree.training.study_config import studies

    return "\n".join(
        [
            "usage: run_study.py study=NAME [KEY=VALUE ...]",
            "",
            "Runs every arm of a study with every seed; the same command goes on after an interruption.",
            "",
            *_table("keys", STUDY_KEYS),
            *_table("studies", dict.fromkeys(studies(), "")),
        ]
    ).rstrip()


def _stage_order(name: str) -> tuple[int, str]:
    known = list(STAGES)
    return (known.index(name) if name in known else len(known), name)


def _table(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"{title}:", *(f"  {key:<{width}}  {value}".rstrip() for key, value in rows.items()), ""]
