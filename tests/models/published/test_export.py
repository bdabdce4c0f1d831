"""Models to share: round trips are bitwise, and a network of another project goes back to where it came from."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers_models import needs_diffusers, saved_ddpm
from documents import run_program
from test_run_lib import CPU, tiny_config

from checkpoints import CheckpointError, read_checkpoint
from experiment.runtime import InvalidRun
from models.published import exported
from models.published.safetensors import read_safetensors
from report.audit import audit
from run_lib import evaluate, export, load, sample, score, train

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections


UNCONSTRAINED = {"model.parameterization": "unconstrained", "eval.features": "inception"}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, exported."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(**UNCONSTRAINED, **{"training.n_iters": 2})
    train(config, workdir, CPU)
    export(config, workdir, CPU)
    return workdir


def test_a_model_that_the_public_code_has_not_is_not_written_for_it(tmp_path: Path) -> None:
    """Its file would be read there, as another score."""
    config = tiny_config(**{"training.n_iters": 1, "model.parameterization": "preconditioned"})
    train(config, tmp_path / "w", CPU)
    export(config, tmp_path / "w", CPU)
    assert {path.name for path in (tmp_path / "w" / "export").iterdir()} == {
        *("model.safetensors", "config.json", "README.md"),
    }


def test_exported_model_is_the_run(run: Path, tmp_path: Path) -> None:
    """Weights, config, images and step; and the program samples from the folder without a config of its own."""
    ours, shared = load(run), load(run / "export")
    assert same(ours.model.state_dict(), shared.model.state_dict())
    assert (shared.config, shared.images, shared.step) == (ours.config, ours.images, ours.step)
    assert shared.trained_on == ours.trained_on and torch.equal(ours.sample(2), shared.sample(2))
    assert "after 2 steps" in (run / "export" / "README.md").read_text()
    small = ("--config.eval.num_samples=2", "--config.sampling.num_steps=2", "--device=cpu")
    flags = (f"--checkpoint={run / 'export'}", f"--workdir={tmp_path / 'new'}", "--mode=sample")
    run_program(["main.py", *small, *flags], only_parse=False)
    (grid,) = (tmp_path / "new" / "samples").glob("*/grid.png")
    assert grid.parent.name.startswith("step_00000002-")


def test_a_model_is_read_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is done with it; its weights may be large."""
    reads: list[Path] = []

    def counted(path: Path) -> dict:
        reads.append(path)
        return read_safetensors(path)

    monkeypatch.setattr(exported, "read_safetensors", counted)
    config = load(run).config
    config.sampling.update(num_samples=1, num_steps=2)
    sample(config, tmp_path / "samples", CPU, run / "export")
    config.training.update(init_from=str(run / "export"), n_iters=3)
    train(config, tmp_path / "run", CPU)
    assert reads == 2 * [run / "export" / "model.safetensors"]


def test_asked_as_another_score(run: Path) -> None:
    """With other settings the weights fit the network, and are another score; or nothing reads the setting."""
    for field, value in (("model.sigma_max", 9.0), ("data.centered", True), ("data.normalization", "none")):
        for path in (run / "export", run / "checkpoints" / "step_00000002.pt"):
            config = load(path).config
            config.update_from_flattened_dict({field: value})
            with pytest.raises(ValueError, match=f"is of another model: {field} was"):
                load(path, config=config)


def test_weights_of_another_run_are_refused_in_the_folder_of_one(run: Path, tmp_path: Path) -> None:
    """Whatever is measured there is shown as that run's, and the card of its export has it."""
    other = tiny_config(**UNCONSTRAINED, **{"training.n_iters": 2, "seed": 7, "eval.enable_sampling": False})
    train(other, tmp_path / "other", CPU)
    checkpoint = tmp_path / "other" / "checkpoints" / "step_00000002.pt"
    public = run / "export" / "checkpoint_2.pth"
    for recipe in (evaluate, score, export):
        with pytest.raises(
            InvalidRun, match=r"step_00000002\.pt is not of the run in --workdir=.*: seed was 42, is 7$"
        ):
            recipe(other, run, CPU, checkpoint)
    with pytest.raises(InvalidRun, match=r"checkpoint_2\.pth is not of the run in .*: it is a public checkpoint$"):
        evaluate(other, run, CPU, public)


@pytest.mark.slow
def test_audit_of_a_run_and_what_was_exported_of_it(run: Path, tmp_path: Path) -> None:
    """They are one model, whatever the config of the audit says of another."""
    fields = {"eval.asym_images": 2, "eval.asym_levels": 2, "eval.enable_sampling": False, "eval.nll_images": 2}
    config = tiny_config(**fields, **{"model.nf": 16, "likelihood.num_steps": 4})
    audit(config, tmp_path, CPU, f"{run},{run / 'export'},{run / 'checkpoints' / 'step_00000002.pt'}")
    found = json.loads((tmp_path / "audit" / "results.json").read_text())
    assert len(found["differences"]) == 2 and all(model["nasym"] > 0 for model in found["models"].values())
    for difference in found["differences"].values():
        assert {quantity["mean"] for quantity in difference.values()} == {0.0}


def test_score_sde_form_and_back(run: Path, tmp_path: Path) -> None:
    """What training goes on from in the public form is the same, bit for bit."""
    config = tiny_config(
        **UNCONSTRAINED, **{"training.n_iters": 4, "training.init_from": str(run / "export" / "checkpoint_2.pth")}
    )
    train(config, tmp_path / "public", CPU)
    config.training.init_from = str(run)
    train(config, tmp_path / "own", CPU)
    public, own = (read_checkpoint(tmp_path / name / "checkpoints" / "step_00000004.pt") for name in ("public", "own"))
    assert same(public["model"], own["model"]) and same(public["ema"]["model"], own["ema"]["model"])


def test_folders_that_are_refused(run: Path, tmp_path: Path) -> None:
    """A header of 100 GB, a missing part, a pickle for weights: one line, and no memory taken."""
    content = (run / "export" / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"].pop("images")
    text = json.dumps(header).encode()
    for number, (weights, message) in enumerate(
        (
            (struct.pack("<Q", 10**11) + content[8:], "no safetensors file, or it is damaged"),
            (content[:-4], "no safetensors file, or it is damaged"),
            ((run / "checkpoints" / "step_00000002.pt").read_bytes(), "no safetensors file, or it is damaged"),
            (struct.pack("<Q", len(text)) + text + content[8 + size :], "has no images"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_bytes((run / "export" / "config.json").read_bytes())
        with pytest.raises(CheckpointError, match=message) as error:
            load(folder)
        assert "\n" not in str(error.value)
    folder, config = tmp_path / "code", json.loads((run / "export" / "config.json").read_text())
    shutil.copytree(run / "export", folder)
    trace = tmp_path / "trace"
    for section, fields in (
        ("model", {"name": "subprocess:getoutput", "cmd": f"touch {trace}"}),
        ("model", {"name": "models.published.given:Given", "function": "os:getcwd", "source": ""}),
        ("eval", {"metrics": ["os:getcwd"]}),
    ):
        (folder / "config.json").write_text(json.dumps(config | {section: config[section] | fields}))
        with pytest.raises(ValueError, match="would run code that this project has not"):
            load(folder)
        command = ["main.py", "--mode=sample", f"--checkpoint={folder}", f"--workdir={tmp_path / 'w'}"]
        with pytest.raises(SystemExit, match="would run code that this project has not"):
            run_program(command, only_parse=True)
        assert not trace.exists()
    # A checkpoint may name a network of somebody's, and nothing else.
    state = read_checkpoint(run / "checkpoints" / "step_00000002.pt")
    named = config["model"] | {"name": "subprocess:getoutput", "cmd": f"touch {trace}"}
    state["record"]["config"] = json.dumps(config | {"model": named})
    torch.save(state, tmp_path / "step.pt")
    with pytest.raises(ValueError, match=r"^model\.name='subprocess:getoutput': is no subclass of Module$"):
        load(tmp_path / "step.pt")
    assert not trace.exists()
    state["record"]["images"] = None
    torch.save(state, tmp_path / "step.pt")
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint; .* parts of its record$"):
        load(tmp_path / "step.pt")
    (folder / "config.json").write_text('{"a":' * 900 + "1" + "}" * 900)
    with pytest.raises(ValueError, match="is nested too deeply"):
        load(folder)
    with pytest.raises(InvalidRun, match="is a public checkpoint already"):
        export(tiny_config(), tmp_path / "again", CPU, run / "export" / "checkpoint_2.pth")


@needs_diffusers
@pytest.mark.slow
def test_qc_fine_tuning_of_a_model_of_diffusers(tmp_path: Path) -> None:
    """It trains with the QC term, resumes without the folder that it began with, and goes back to the library, whose
    own pipeline runs it: the network there is the run's average."""
    from diffusers import DDPMPipeline

    saved_ddpm(tmp_path / "from", "trained_betas")
    fields = {"training.init_from": f"diffusers:{tmp_path / 'from'}", "training.qc_weight": 0.1}
    fields |= {"training.n_iters": 2, "data.image_size": 8, "model.ema_rate": 0.0}
    config, workdir = tiny_config(**fields), tmp_path / "qc"
    train(config, workdir, CPU)
    before, score = load(tmp_path / "from"), load(workdir)
    assert not same(before.model.state_dict(), score.model.state_dict())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("qc", 0) > 0 for row in rows)
    assert score.images.centered and score.config.training.sde == "sde_lib:LadderVP"
    pipeline = DDPMPipeline.from_pretrained(workdir / "export" / "diffusers")
    images = pipeline(1, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (1, 8, 8, 1)
    own = {name.removeprefix("network.unet."): tensor for name, tensor in score.model.state_dict().items()}
    assert same(own, dict(pipeline.unet.state_dict()))
    # Its weights went there and back before any step.
    first = read_safetensors(tmp_path / "from" / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(first, {name.removeprefix("network.unet."): t for name, t in before.model.state_dict().items()})
    shutil.rmtree(tmp_path / "from")
    config = load(workdir).config
    config.training.n_iters = 3
    train(config, workdir, CPU)
    assert load(workdir).step == 3
