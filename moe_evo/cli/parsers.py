"""The options of every command of `moe-evo`, with their help texts."""

from __future__ import annotations

from moe_evo.cli.task_command import tasks_parser
from moe_evo.config.file import config_parser, plain_parser
from moe_evo.config.parser import CommandParser
from moe_evo.config.recover import RecoverConfig, RecoveryConfig
from moe_evo.config.run import RunConfig, ScoringConfig, TrackingConfig
from moe_evo.config.sweep import SweepConfig

_RUNS = "folders of runs, finished or not; that of a sweep stands for all of its runs"


def search_parser() -> CommandParser:
    parser = config_parser(
        "search",
        "Search which experts to keep and merge. The same command again goes on where it stood. With --recover the "
        "winner then learns from the full model what pruning broke (moe-evo recover), into the folder RUN/recovered.",
        "moe-evo search [CONFIG.yaml] [--section.key VALUE ...] [--recover] | --resume RUN",
        RunConfig,
    )
    parser.add_argument(
        "--resume", is_path=True, metavar="RUN", type=str | None, help="go on with the run in this folder"
    )
    _add_recovery(parser)
    return parser


def _add_recovery(parser: CommandParser) -> None:
    """The switch --recover, and the options of what comes then."""
    parser.add_section(RecoverConfig, "recover")
    parser.add_switch("recover", "and_recover")


def sweep_parser() -> CommandParser:
    parser = config_parser(
        "sweep",
        "Search for every combination of numbers of experts, seeds, algorithms and tasks, on gangs that all searches "
        "share. The same command again makes the runs that are missing.",
        "moe-evo sweep [CONFIG.yaml] --sweep.num_kept 2,4,6 --sweep.seeds 0,1,2 [--section.key VALUE ...] [--no-tune]",
        SweepConfig,
    )
    parser.add_argument(
        "--no-tune",
        type=bool,
        default=False,
        help="one run after the other in this process, without Ray Tune (and without Ray, if cluster.address is unset)",
    )
    return parser


def plan_parser() -> CommandParser:
    parser = config_parser(
        "plan",
        "Tell what a search would take, without loading weights: the model's size, memory of each rank for each way "
        "of sharding, gangs that fit the cluster, and everything that is wrong with the config. With --recover also "
        "what the winner's recovery stores and takes.",
        "moe-evo plan [CONFIG.yaml] [--section.key VALUE ...] [--calibrate] [--recover]",
        RunConfig,
    )
    parser.add_argument(
        "--memory_gib",
        type=float | None,
        help="memory of one rank's device; default: what is free here, and unknown for a cluster",
    )
    parser.add_argument(
        "--calibrate",
        type=bool,
        default=False,
        help="load the model once and time a few evaluations, so that the time of the whole search can be told",
    )
    _add_recovery(parser)
    return parser


def evaluate_parser() -> CommandParser:
    parser = config_parser(
        "evaluate",
        "Score one genome on one split, with the model and tasks of a config or of a run; of a run it is the "
        "winner unless --genome says otherwise. With --baseline another genome is scored on the same examples, and "
        "told whether the two can be told apart.",
        "moe-evo evaluate [RUN | CONFIG.yaml] [--genome GENOME] [--baseline GENOME] [--split SPLIT] [--samples FILE] "
        "[--section.key VALUE ...]",
        ScoringConfig,
    )
    parser.add_argument(
        "--genome",
        type=str | None,
        help="a .safetensors genome, an EEP .pth file, a run's folder (its best), a checkpoint's folder (that prune "
        "made), a kept-list such as '[[0,3],[1,2]]' or a JSON file of one, or 'full' for the whole model; default: the "
        "run's best, or 'full'",
    )
    parser.add_argument("--top_k", type=int | None, help="experts active a token, in place of the genome's own")
    splits = ("search", "validation", "test")
    parser.add_argument("--split", choices=splits, default="validation", help="which examples")
    parser.add_argument("--baseline", type=str | None, metavar="GENOME", help="one to compare with, such as 'full'")
    parser.add_argument(
        "--samples",
        is_path=True,
        type=str | None,
        metavar="FILE",
        help="a new file of JSONL: for every example the prompt, the choices with their log-likelihoods or the text "
        "that was generated, the right answer and the score",
    )
    return parser


def prune_parser() -> CommandParser:
    parser = config_parser(
        "prune",
        "Prune or merge without a search, by a one-shot method that looks at the tasks' search split; "
        "write the checkpoint, and score the full and the smaller model on the test split. With --recover the smaller "
        "one then learns from the full one what pruning broke (moe-evo recover), into the folder DIR-recovered.",
        "moe-evo prune [CONFIG.yaml] --method reap --num_kept 4 --to DIR [--section.key VALUE ...] [--recover]",
        ScoringConfig,
    )
    parser.add_argument("--method", type=str, required=True, help="a one-shot method; `moe-evo criteria` lists them")
    parser.add_argument("--num_kept", type=int, required=True, help="experts kept in every MoE layer")
    parser.add_argument("--to", is_path=True, type=str, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--observations",
        is_path=True,
        type=str | None,
        metavar="FILE",
        help="what the model does on tasks: what FILE knows is not observed again, and what it does not is added",
    )
    parser.add_argument(
        "--blend",
        type=dict[str, float] | None,
        metavar="'{TASK: TIMES, ...}'",
        help="how many times each task's tokens count; default: once, so that long tasks weigh more",
    )
    parser.add_argument(
        "--allocation",
        choices=("uniform", "global"),
        default="uniform",
        help="'global': layers differ in how many experts they keep, num_kept on average (for our own loader)",
    )
    parser.add_argument(
        "--progressive",
        type=bool,
        default=False,
        help="score each layer behind those before it as they were pruned or merged: a pass over the tasks for every "
        "layer",
    )
    parser.add_argument(
        "--base_model",
        is_path=True,
        type=str | None,
        metavar="PATH",
        help="the checkpoint before fine-tuning, for methods that compare router rows with it; only those are read",
    )
    parser.add_argument(
        "--aligned",
        type=bool | None,
        help="merges: reorder each expert's neurons to match those of the expert that leads its group (default: as the "
        "method's paper does); other commands do so with --model.alignment DIR/moe_evo/alignment.safetensors",
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace DIR if it is an older export")
    _add_recovery(parser)
    return parser


def recover_parser() -> CommandParser:
    parser = config_parser(
        "recover",
        "Let a pruned model learn from the full one what pruning broke, by distillation: the full model reads prompts "
        "and writes answers, and the pruned one learns to expect the same. Writes a stock checkpoint, and scores the "
        "full, the pruned and the recovered model on the test split. The same command again goes on where it stood.",
        "moe-evo recover CHECKPOINT | RUN [CONFIG.yaml] --to DIR [--recover.prompts FILE] [--section.key VALUE ...]",
        RecoveryConfig,
    )
    parser.add_argument(
        "pruned",
        is_path=True,
        type=str,
        metavar="CHECKPOINT | RUN",
        help="what is to learn: an exported folder, whose full model is --model.path; or the folder of a finished run, "
        "whose config says what model and tasks there are",
    )
    parser.add_argument("--to", is_path=True, type=str, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--which", type=str, default="best", help="of a run: the genome, as for moe-evo export (default: the winner)"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace DIR if it is an older export")
    return parser


def compress_parser() -> CommandParser:
    parser = config_parser(
        "compress",
        "Make the experts of a checkpoint sparse (moe_pruner) or of low rank (mc_smoe), write them densely in stock "
        "format, score the model before and after on the test split, and count what the experts would take packed.",
        "moe-evo compress CHECKPOINT [CONFIG.yaml] --method moe_pruner --to DIR [--section.key VALUE ...]",
        ScoringConfig,
    )
    parser.add_argument(
        "checkpoint",
        is_path=True,
        type=str,
        metavar="CHECKPOINT",
        help="an exported folder or any other model; sets model.path",
    )
    parser.add_argument("--method", type=str, required=True, help="moe_pruner or mc_smoe")
    parser.add_argument("--to", is_path=True, type=str, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--sparsity", type=float | None, help="moe_pruner: share of each row's weights that become zero (default: 0.5)"
    )
    parser.add_argument(
        "--pattern",
        type=str | None,
        metavar="N:M",
        help="moe_pruner: keep N of every M consecutive weights of a row instead, such as 2:4",
    )
    parser.add_argument(
        "--rank",
        type=int | float | None,
        help="mc_smoe: rank of each matrix's factors, or a share of its full rank such as 0.25",
    )
    parser.add_argument(
        "--columns",
        type=float | None,
        help="mc_smoe: share of the residual's columns that are kept beside them (default: 0.1)",
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace DIR if it is an older export")
    return parser


def carve_parser() -> CommandParser:
    parser = config_parser(
        "carve",
        "Make an MoE of a dense model (llama, mistral, qwen2, qwen3): the neurons of every FFN are shared out among "
        "experts of equal size, those that are active together into the same one, and a router is made in closed form; "
        "no training. Writes a stock checkpoint that is the dense model when all experts are active, and scores both "
        "on the test split. With fewer active experts it is faster and worse, until moe-evo recover lets it learn from "
        "the dense model.",
        "moe-evo carve MODEL [CONFIG.yaml] --to DIR [--num_experts 8] [--top_k 4] [--section.key VALUE ...]",
        ScoringConfig,
    )
    parser.add_argument(
        "dense", is_path=True, type=str, metavar="MODEL", help="folder or Hugging Face name; sets model.path"
    )
    parser.add_argument("--to", is_path=True, type=str, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--method",
        choices=("cluster", "upcycle"),
        default="cluster",
        help="'cluster' shares out the neurons; 'upcycle' makes every expert a copy of the whole FFN (sparse "
        "upcycling), which computes the same as before and is to be trained",
    )
    parser.add_argument("--num_experts", type=int, default=8, help="experts of every layer, without the shared one")
    parser.add_argument(
        "--top_k",
        type=int | None,
        help="experts active a token (default: half of them); each of these has the weight it had in the dense model, "
        "so carve again for another number",
    )
    parser.add_argument(
        "--shared_size",
        type=int | None,
        help="cluster: neurons, those active most often, of a shared expert that runs for every token (default: 0); "
        "makes a qwen2_moe of a llama or mistral, and not possible for qwen3",
    )
    parser.add_argument(
        "--router",
        choices=("least_squares", "centroid"),
        help="cluster: 'least_squares' predicts which experts put out most (default), 'centroid' is the mean of its "
        "neurons' gate rows",
    )
    parser.add_argument(
        "--prompts",
        type=str | None,
        metavar="FILE",
        help="cluster: what neurons are watched on, in place of the tasks' search split: JSONL with 'prompt' or "
        "'text', or plain text with one text a line",
    )
    parser.add_argument(
        "--profile_tokens", type=int | None, help="cluster: most tokens that neurons are watched on (default: 8192)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of prompts and of the clusters; upcycle: of the router"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace DIR if it is an older export")
    return parser


def criteria_parser() -> CommandParser:
    return plain_parser("criteria", "List the one-shot criteria and merges, with one line each.")


def show_parser() -> CommandParser:
    parser = plain_parser(
        "show",
        "Table, kept experts and files of a run, and what its table means: whether the winner can be told from the "
        "full model, and what guessing scores. Of a sweep a line for each contender and number of experts: mean over "
        "seeds and their spread.",
    )
    parser.add_argument(
        "run", is_path=True, type=str, metavar="RUN | SWEEP", help="folder of a run, finished or not, or of a sweep"
    )
    return parser


def compare_parser() -> CommandParser:
    parser = plain_parser(
        "compare",
        "The final tables of several runs as one: by tasks and model, then few experts first, then the best test "
        "score first. Unfinished runs stand there with what they have. Then every winner against that of the first "
        "RUN, on the same test examples: the difference of their scores with its 95 % interval, McNemar's test, and a "
        "verdict. Of runs that differ only in their seed, mean and spread.",
    )
    parser.add_argument("runs", is_path=True, type=str, nargs="+", metavar="RUN", help=_RUNS)
    parser.add_argument(
        "--format",
        choices=("table", "csv", "json"),
        default="table",
        help="for people, or for other programs; csv has no pairs",
    )
    return parser


def report_parser() -> CommandParser:
    parser = plain_parser(
        "report",
        "Write one HTML page over runs that needs no network: search curves, kept experts, lineage, scores by task, "
        "score against size, any two runs side by side, failures, and the commands to reproduce and export.",
    )
    parser.add_argument("runs", is_path=True, type=str, nargs="+", metavar="RUN", help=_RUNS)
    parser.add_argument(
        "--to",
        is_path=True,
        type=str | None,
        metavar="FILE",
        help="file to write; default: report.html in the folder of a single run or sweep",
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace FILE even if it is no older report")
    return parser


def export_parser() -> CommandParser:
    parser = plain_parser(
        "export",
        "Write the smaller checkpoint of a finished run, then reload it with stock transformers and compare its "
        "logits with what was evaluated.",
    )
    parser.add_argument("run", is_path=True, type=str, help="folder of a finished run")
    parser.add_argument("--to", is_path=True, type=str, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--which",
        type=str,
        default="best",
        help="the winner ('best'), the best that only prunes ('best_pruning'), the soup (selection.soup), or a point "
        "of the front (search.objectives), such as front-3; moe-evo show lists them",
    )
    parser.add_argument("--device", type=str, default="cpu", help="where to load the model; it needs room for both")
    parser.add_argument("--model.path", type=str | None, help="where the model lies now, if it moved after the search")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace DIR if it is an older export")
    return parser


def wandb_replay_parser() -> CommandParser:
    parser = plain_parser(
        "wandb-replay",
        "Write a new run of Weights & Biases from the journal of a search, finished or not; a search that goes on "
        "later goes on in that one.",
    )
    parser.add_argument("run", is_path=True, type=str, help="folder of a run that no process is working on")
    parser.add_section(TrackingConfig, "tracking")
    return parser


def doctor_parser() -> CommandParser:
    return plain_parser(
        "doctor",
        "Tell what is installed and what was tested, what this machine offers, and whether what a run relies on holds "
        "here: the self-check of the embedded model and of a tiny one of every family. One line a check, about a "
        "minute; paste it into a bug report. Exit code 2 where something is broken.",
    )


PARSERS = {
    "search": search_parser,
    "sweep": sweep_parser,
    "plan": plan_parser,
    "tasks": tasks_parser,
    "evaluate": evaluate_parser,
    "prune": prune_parser,
    "recover": recover_parser,
    "compress": compress_parser,
    "carve": carve_parser,
    "criteria": criteria_parser,
    "show": show_parser,
    "compare": compare_parser,
    "report": report_parser,
    "export": export_parser,
    "wandb-replay": wandb_replay_parser,
    "doctor": doctor_parser,
}
"""A parser for each command."""
