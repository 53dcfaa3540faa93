"""Every bad input is one clear line and exit code 2, before a model is loaded, and nothing is lost."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import moe_evo
from moe_evo.cli.main import main
from moe_evo.genomes.file import save_individual
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, Individual
from moe_evo.genomes.space import ModelShape, SearchSpace

BadInput = Callable[[Path], list[str]]


def _task(rows: object) -> BadInput:
    def prepare(folder: Path) -> list[str]:
        lines = rows if isinstance(rows, list) else [rows]
        (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        return ["search", "--tasks", json.dumps([str(folder / "task.jsonl")])]

    return prepare


def _file(name: str, content: bytes, *argv: str) -> BadInput:
    def prepare(folder: Path) -> list[str]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return [word.format(folder=folder) for word in argv]

    return prepare


def _llama(folder: Path) -> list[str]:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return ["search", "--model.path", str(folder)]


def _pickled_model(folder: Path) -> list[str]:
    shutil.copy(Path(moe_evo.__file__).parent / "data" / "model" / "config.json", folder / "config.json")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return ["search", "--model.path", str(folder)]


def _other_genome(folder: Path) -> list[str]:
    shape = ModelShape("mixtral", (4, 4), (2, 2), (0, 1))
    individual = Individual(Candidate(0, Genome.from_kept([[0, 1], [2, 3]], 4, 2), "random_pruning"), Evaluation(0.5))
    save_individual(folder / "g.safetensors", individual, SearchSpace.build(shape, num_kept=2), {})
    return ["evaluate", "--genome", str(folder / "g.safetensors")]


def _plain_tensors(folder: Path) -> list[str]:
    save_file({"weight": np.zeros((2, 2), np.float32)}, folder / "g.safetensors")
    return ["evaluate", "--genome", str(folder / "g.safetensors")]


def _unwritable(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["search", "--folder", str(folder / "file" / "run")]


def _foreign_folder(folder: Path) -> list[str]:
    (folder / "thesis.tex").write_text("precious")
    return ["search", "--folder", str(folder)]


def _unfinished(folder: Path) -> list[str]:
    (folder / "config.yaml").write_text("tasks: [syll]\n")
    return ["evaluate", "--genome", str(folder)]


def _resume_with_config(folder: Path) -> list[str]:
    (folder / "some.yaml").write_text("search: {num_kept: 2}\n")
    return ["search", str(folder / "some.yaml"), f"--resume={folder}"]


def _long_answer(folder: Path) -> list[str]:
    (folder / "t").mkdir()
    for split in ("search", "validation", "test"):
        rows = [{"prompt": f"{split} {n}", "choices": [" yes", " no"], "label": 0} for n in range(3)]
        if split == "test":
            rows[1]["choices"] = [" yes", " no" * 50]
        (folder / "t" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["search", "--tasks", json.dumps([{"data": str(folder / "t"), "max_length": 40}])]


GOOD_ROW = {"prompt": "p", "choices": [" a", " b"], "label": 0}

BAD_INPUTS: dict[str, tuple[BadInput, str]] = {
    "unknown command": (lambda _: ["serach"], "unknown command 'serach'"),
    "command that is nearly one": (lambda _: ["exprot"], "; did you mean 'export'?"),
    "option before the command": (lambda _: ["--foo"], "unknown option '--foo' before any command, expected one of: "),
    "option that is nearly one": (lambda _: ["--verison"], "; did you mean '--version'?"),
    "unknown flag": (
        lambda _: ["search", "--serch.seed", "3"],
        "--serch.seed: no such option; did you mean --search.seed?",
    ),
    "flag without its section": (lambda _: ["search", "--sead", "1"], "--sead: no such option; did you mean --search."),
    "flag that is near none": (lambda _: ["search", "--zzz=1"], "--zzz: no such option; --help lists all options"),
    "abbreviated flag": (lambda _: ["search", "--search.evaluation", "3"], "--search.evaluation"),
    "word that belongs nowhere": (
        lambda _: ["evaluate", "--top_k", "1", "2"],
        "got '2', which belongs to no option; --help tells what each takes",
    ),
    "search metric of another kind": (
        lambda _: ["search", "--tasks", '[{"data": "nli", "search_metric": "f1"}]'],
        "tasks (nli).search_metric: got 'f1', expected accuracy, accuracy_norm, log_likelihood, probability, "
        "probability_norm or default for a task of kind choice",
    ),
    "search metrics of two units": (
        lambda _: ["search", "--tasks", '[syll, {"data": "nli", "search_metric": "log_likelihood"}]'],
        "tasks: fitness on the search split would mix units (syll is a share from 0 to 1, nli is in nats)",
    ),
    "unknown key": (
        _file("c.yaml", b"search:\n  sed: 3\n", "search", "{folder}/c.yaml"),
        "search.sed: no such option; did you mean search.seed? (config ",
    ),
    "option of an older version": (
        _file("c.yaml", b"selection: {frequency: true}", "search", "{folder}/c.yaml"),
        "selection.frequency: older versions had it; the baselines now stand in selection.baselines",
    ),
    "checkpoint as config": (
        _file("m/config.json", b"{}", "evaluate", "{folder}/m"),
        "m: has no config.yaml; give a YAML file or a run's folder (a checkpoint is given as --model.path)",
    ),
    "missing config of an evaluation": (lambda _: ["evaluate", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    "option of another command": (lambda _: ["evaluate", "--search.seed", "1"], "--search.seed"),
    "unknown section": (_file("c.yaml", b"serch:\n  seed: 1\n", "evaluate", "{folder}/c.yaml"), "serch"),
    "missing config": (lambda _: ["search", "nowhere.yaml"], "nowhere.yaml"),
    "config is not YAML": (_file("c.yaml", b"a: [", "search", "{folder}/c.yaml"), "c.yaml"),
    "wrong type": (
        lambda _: ["search", "--search.num_kept", "few"],
        "search.num_kept: got 'few', expected a whole number or a list of whole numbers or names with whole numbers",
    ),
    "neither true nor false": (
        lambda _: ["search", "--selection.soup", "maybe"],
        "selection.soup: got 'maybe', expected true or false",
    ),
    "shares that are no numbers": (
        lambda _: ["search", "--search.init", "{reap: few}"],
        "search.init: got \"{'reap': 'few'}\", expected a list of names or names with numbers",
    ),
    "a single method that is none": (
        lambda _: ["search", "--search.init", "reep"],
        "search.init: got 'reep', did you mean 'reap'? expected one of",
    ),
    "a section that is none": (
        _file("c.yaml", b"search: 3", "search", "{folder}/c.yaml"),
        "search: got '3', expected names with values, as in '{NAME: VALUE}' (config ",
    ),
    "null for a number": (
        _file("c.yaml", b"search: {seed: null}", "search", "{folder}/c.yaml"),
        "search.seed: got 'None', expected a whole number (config ",
    ),
    "wrong type in a task": (
        lambda _: ["search", "--tasks", "[{data: syll, num_search: few}]"],
        "tasks.num_search: got 'few', expected a whole number",
    ),
    "wrong type of a task's key": (
        lambda _: ["search", "--tasks.num_search", "few"],
        "tasks.num_search: got 'few', expected a whole number",
    ),
    "share of a method that is no number": (
        lambda _: ["search", "--search.init.reap", "few"],
        "search.init.reap: got 'few', expected a number",
    ),
    "element of a list": (
        lambda _: ["sweep", "--sweep.algorithms", "eep,foo"],
        "sweep.algorithms: got 'foo', expected one of eep, eep_release, random, surrogate",
    ),
    "neither number nor word": (
        lambda _: ["search", "--cluster.num_gangs", "many"],
        "cluster.num_gangs: got 'many', expected a whole number or 'auto'",
    ),
    "no value": (lambda _: ["search", "--search.seed"], "argument --search.seed: expected one argument"),
    "empty value": (lambda _: ["search", "--search.seed="], "search.seed: got '', expected a whole number"),
    "one more for what is no list": (lambda _: ["search", "--search.seed+", "3"], "--search.seed+: no such option"),
    "words apart": (
        lambda _: ["report", "a", "--overwrite", "b"],
        "got 'b', which belongs to no option",
    ),
    "out of range": (lambda _: ["search", "--search.evaluations", "0"], "search.evaluations: got 0"),
    "rate above one": (
        lambda _: ["search", "--search.algorithm", "eep", "--search.eep.sigma", "-1"],
        "search.eep.sigma",
    ),
    "options beside a preset": (
        lambda _: ["search", "--search.algorithm", "eep_release", "--search.eep.sigma", "0.5"],
        "use algorithm 'eep' to change them",
    ),
    "options of another search": (
        lambda _: ["search", "--search.algorithm", "eep", "--search.surrogate.batch", "5"],
        "use algorithm 'surrogate' to change them",
    ),
    "a prior that scores no experts": (
        lambda _: ["search", "--search.algorithm", "surrogate", "--search.surrogate.priors", "[m_smoe]"],
        "search.surrogate.priors: got 'm_smoe', expected one that scores every expert (frequency, ",
    ),
    "an unknown prior": (
        lambda _: ["search", "--search.algorithm", "surrogate", "--search.surrogate.priors", "[reep]"],
        "search.surrogate.priors: got 'reep'",
    ),
    "no candidates in a batch": (
        lambda _: ["search", "--search.algorithm", "surrogate", "--search.surrogate.batch", "0"],
        "search.surrogate.batch: got 0",
    ),
    "a search that only prunes from a merge": (
        lambda _: ["search", "--search.algorithm", "surrogate", "--search.init", "m_smoe"],
        "search.init: m_smoe merges, but surrogate only prunes",
    ),
    "K above E": (lambda _: ["search", "--search.num_kept", "9"], "search.num_kept: got 9, MoE layer 0 has 8"),
    "K below top_k": (lambda _: ["search", "--search.num_kept", "1"], "set search.top_k to 1"),
    "K list of another length": (lambda _: ["search", "--search.num_kept", "[4,4]"], "the model has 4 MoE layers"),
    "K not a multiple": (lambda _: ["search", "--search.multiple_of", "3"], "multiple of search.multiple_of 3"),
    "too many groups": (lambda _: ["search", "--search.num_layer_groups", "5"], "search.num_layer_groups: got 5"),
    "missing task": (lambda _: ["search", "--tasks", '["nowhere.jsonl"]'], "embedded tasks are arith"),
    "no task": (lambda _: ["search", "--tasks", "[]"], "at least one task"),
    "same task twice": (lambda _: ["search", "--tasks", '["nli", "nli"]'], "'nli' twice"),
    "wrong field": (_task({"prompt": "p", "chioces": [" a", " b"], "label": 0}), "task.jsonl:1"),
    "label out of range": (_task([GOOD_ROW, {**GOOD_ROW, "label": 2}]), "task.jsonl:2"),
    "not JSON": (
        _file("t.jsonl", b'{"prompt": \n', "search", "--tasks", '["{folder}/t.jsonl"]'),
        "t.jsonl:1",
    ),
    "too few examples": (_task([GOOD_ROW]), "split"),
    "metric of another kind": (
        lambda _: ["search", "--tasks", '[{"data": "nli", "metric": "f1"}]'],
        "f1",
    ),
    "not a MoE model": (_llama, "Mixture-of-Experts"),
    "missing model": (lambda _: ["search", "--model.path", "/nowhere/model"], "/nowhere/model: no such folder"),
    "not a checkpoint": (
        _file("m/notes.txt", b"", "search", "--model.path", "{folder}/m"),
        "has no config.json",
    ),
    "pickled weights": (_pickled_model, "holds pickled weights only, which can run code"),
    "missing device": (lambda _: ["search", "--model.device", "cuda:7"], "model.device"),
    "genome is missing": (lambda _: ["evaluate", "--genome", "nowhere.safetensors"], "no such file"),
    "folder without a genome": (
        _file("m/config.json", b"{}", "evaluate", "--genome", "{folder}/m"),
        "m: has no genome: found neither moe_evo/genome.safetensors, as moe-evo prune writes it, nor the config.yaml",
    ),
    "genome is a pickle": (
        _file("g.safetensors", pickle.dumps({"a": 1}), "evaluate", "--genome", "{folder}/g.safetensors"),
        "g.safetensors",
    ),
    "genome is other tensors": (_plain_tensors, "give a genome file that moe_evo saved"),
    "genome of another model": (_other_genome, "made for 2 MoE layers of 4 experts, the model has 4 of 8"),
    "coefficients are a pickle": (
        _file("g.pth", pickle.dumps(print), "evaluate", "--genome", "{folder}/g.pth"),
        "g.pth",
    ),
    "kept-list out of range": (lambda _: ["evaluate", "--genome", "[[0,8],[0,1],[0,1],[0,1]]"], "experts 0 to 7"),
    "kept-list of another length": (lambda _: ["evaluate", "--genome", "[[0,1]]"], "MoE layers"),
    "more active experts than kept": (
        lambda _: ["evaluate", "--genome", "[[0],[1],[2],[3]]"],
        "got 2 with 1 experts kept",
    ),
    "top_k of nothing": (lambda _: ["evaluate", "--top_k", "0"], "top_k: got 0"),
    "unknown split": (
        lambda _: ["evaluate", "--split", "train"],
        "split: got 'train', expected one of 'search', 'validation', 'test'",
    ),
    "show of no run": (lambda folder: ["show", str(folder)], "not the folder of a run"),
    "export of no run": (lambda folder: ["export", str(folder), "--to", "x"], "not the folder of a run"),
    "export without target": (
        lambda folder: ["export", str(folder)],
        "--to: is missing, expected --to DIR, folder to write",
    ),
    "resume of no run": (lambda folder: ["search", "--resume", str(folder)], "not the folder of a run"),
    "resume with other options": (
        lambda folder: ["search", "--resume", str(folder), "--search.seed", "3"],
        "a run keeps its config",
    ),
    "resume with a config": (_resume_with_config, "a run keeps its config"),
    "resume with another option, joined by =": (
        lambda folder: ["search", f"--resume={folder}", "--search.seed=3"],
        "a run keeps its config",
    ),
    "an answer that is longer than max_length": (_long_answer, "t/test.jsonl:2"),
    "metrics of different units": (
        lambda _: ["search", "--tasks", '["syll", {"data": "nli", "metric": "log_likelihood"}]'],
        "fitness would mix units",
    ),
    "value of a task": (
        lambda _: ["search", "--tasks", '[{"data": "syll", "split_shares": [0.5, 0.5, 0.5]}]'],
        "tasks (syll).split_shares: got (0.5, 0.5, 0.5), expected three positive shares with sum 1",
    ),
    "unknown key of a task": (lambda _: ["search", "--tasks", "[{data: syll, metrik: f1}]"], "metrik"),
    "tasks that are no YAML": (lambda _: ["search", "--tasks", "[syll"], "--tasks: is not YAML"),
    "unfinished run": (_unfinished, "this run is not finished"),
    "long word": (lambda _: ["evaluate", "--genome", "x" * 300], "no such file"),
    "unwritable folder": (_unwritable, "choose another folder"),
    "folder with other files": (_foreign_folder, "holds other files and no run"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_clear_line_and_exit_code_two_before_any_model_is_loaded(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("moe_evo.models.load.load_model", refuse)
    monkeypatch.chdir(tmp_path)
    prepare, expected = BAD_INPUTS[case]
    argv = prepare(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code = main(argv)
    err = capsys.readouterr().err
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("moe-evo: error: ")
    assert expected in err
    assert {path: path.read_bytes() for path in before} == before
