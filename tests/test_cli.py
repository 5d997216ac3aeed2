import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

import mim_jax
from mim_jax import cli
from mim_jax import config as configs
from mim_jax.conversion.files import write_state_dict
from mim_jax.evaluation.protocols import PROTOCOLS
from tests.methods.tiny import tiny_mae, tiny_params

TINY = [
    "--config=mae:tiny",
    "--config.model.width=16",
    "--config.model.depth=2",
    "--config.model.heads=2",
    "--config.model.patch_size=(4,4)",
    "--config.model.decoder_width=8",
    "--config.model.decoder_depth=2",
    "--config.model.decoder_heads=2",
    "--config.model.mask_ratio=0.5",
    "--config.data.image_size=(8,12)",
    "--config.batch_size=8",
]
"""The model of `tests.methods.tiny`."""


@pytest.fixture(autouse=True)
def away_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MIM_JAX_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


@pytest.fixture
def error_of(capsys):
    """Runs a command that must fail: exit code 1 and one message on stderr, which it returns."""

    def call(*arguments: str) -> str:
        assert run(*arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        return err.removeprefix("error: ").strip()

    return call


@pytest.fixture
def trained(monkeypatch):
    """Takes the place of training; holds what it was called with."""
    call = types.SimpleNamespace(config=None, folder=None, error=None)

    def train(config, folder, *, console):
        call.config, call.folder = config, folder
        if call.error:
            raise call.error
        rows = {"trained": {"knn": 0.5, "linear": 0.75}, "raw pixels": {"knn": 0.25}}
        return types.SimpleNamespace(evaluation=rows, picture=Path("a.png"), folder=folder)

    monkeypatch.setattr("mim_jax.training.loop.train", train)
    return call


def test_flags_may_be_written_with_dashes(capsys, tmp_path):
    missing = tmp_path / "no-such-file.pth"
    flags = ("--config", "mae:tiny", f"--init-from={missing}", f"--workdir={tmp_path / 'run'}")
    assert run("train", *flags) == 1
    assert f"there is no checkpoint file {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_usage_names_every_verb(capsys, arguments):
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"mim-jax {verb}" in out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == mim_jax.__version__


def test_an_unknown_verb_is_an_error_that_lists_the_known(error_of):
    assert error_of("trian") == (f"unknown command 'trian'; known are {', '.join(cli.VERBS)}.")


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_help_of_a_verb_lists_its_flags(capsys, verb, flag):
    assert run(verb, flag) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"mim-jax {verb}\n")
    own = {
        "train": "workdir",
        "evaluate": "protocol",
        "inspect": "devices",
        "plan": "chip",
        "convert": "output",
        "visualize": "rows",
        "data": "source",
        "replay": "step",
        "verify": "config",
        "generate": "identities",
    }
    assert f"--{own[verb]}: " in out
    assert verb == "verify" or "Default: " in out
    if verb in ("train", "inspect"):
        for field, value in configs.leaves(configs.load("mae:tiny")).items():
            assert f"--config.{field}={value!r}" in out


def test_help_of_evaluate_names_every_protocol(capsys):
    assert run("evaluate", "--help") == 0
    shown = capsys.readouterr().out
    assert [name for name in PROTOCOLS if not re.search(rf"\b{name}\b", shown)] == []


def test_help_shows_the_fields_of_the_named_config(capsys):
    assert run("train", "--config", "mae:vit_l16", "--config.seed=7", "--help") == 0
    out = capsys.readouterr().out
    assert "--config.model.size='large'" in out
    assert "--config.seed=7" in out


@pytest.mark.parametrize("verb", ["train", "inspect"])
def test_a_missing_config_is_an_error_that_lists_the_known(error_of, verb):
    message = error_of(verb)
    assert message.startswith("--config is missing; known configs are cae, dmjd, ")
    assert message.endswith(", such as mae:tiny.")
    assert "--config is missing" in error_of(verb, "--config")


def test_an_unknown_config_or_variant_is_an_error(error_of):
    assert "Did you mean 'mae'?" in error_of("train", "--config", "mea:tiny")
    assert "has no variant 'tinny'" in error_of("train", "--config=mae:tinny")


@pytest.mark.parametrize("flag", ["--config.batchsize=3", "--config.batchsize"])
def test_an_unknown_field_is_an_error_that_names_the_nearest(error_of, flag):
    message = error_of("train", "--config", "mae:tiny", flag, "3")
    assert message == "the config has no field 'batchsize'. Did you mean 'batch_size'?"


def test_an_unknown_flag_is_an_error(error_of):
    assert "workdri" in error_of("train", "--config", "mae:tiny", "--workdri=x")


def test_a_word_that_is_no_flag_is_an_error(error_of):
    message = error_of("train", "--config", "mae:tiny", "runs/x")
    assert message == "unexpected argument 'runs/x'; flags begin with --."


@pytest.mark.parametrize(
    "flag",
    [
        "--config.batch_size=many",
        "--config.batch_size=1.5",
        "--config.epochs=long",
        "--config.data.flip=perhaps",
        "--config.data.image_size=wide",
    ],
)
def test_an_ill_typed_value_is_an_error_that_names_the_field(error_of, flag):
    field, _, value = flag.removeprefix("--config.").partition("=")
    message = error_of("train", "--config", "mae:tiny", flag)
    assert field in message
    assert value in message


def test_overrides_take_the_type_of_their_field(trained):
    code = run(
        "train",
        "--config",
        "mae:tiny",
        "--config.data.image_size=(32, 16)",
        "--config.data.mean=0.5,",
        "--config.batch_size",
        "64",
        "--config.epochs=3",
        "--config.optimizer.base_lr=1e-3",
        "--config.data.flip=false",
        "--config.log.wandb",
        "--config.data.source=folder:some where",
        "--config.evaluate.protocols=('knn',)",
        "--config.seed=1",
        "--config.seed",
        "2",
    )
    assert code == 0
    config = trained.config
    assert config.data.image_size == (32, 16)
    assert config.data.mean == (0.5,)
    assert config.batch_size == 64
    assert (config.epochs, type(config.epochs)) == (3.0, float)
    assert config.optimizer.base_lr == 1e-3
    assert config.data.flip is False
    assert config.log.wandb is True
    assert config.data.source == "folder:some where"
    assert config.evaluate.protocols == ("knn",)
    assert config.seed == 2
    assert config.model == configs.load("mae:tiny").model


def test_the_last_of_repeated_overrides_counts(trained):
    flags = ["--config.data.image_size=(8,8)", "--config.seed", "3", "--config.data.flip"]
    flags += ["--config.data.image_size", "(16,16)", "--config.seed=4", "--config.data.flip=false"]
    assert run("train", "--config=mae:tiny", *flags, "--workdir=x") == 0
    assert trained.config.data.image_size == (16, 16)
    assert trained.config.seed == 4
    assert trained.config.data.flip is False
    assert trained.folder == Path("x")


def test_train_prints_accuracies_picture_and_where_the_checkpoint_is(trained, capsys):
    assert run("train", "--config=mae:tiny", "--workdir=here", "--init_from=mae.pth") == 0
    assert trained.folder == Path("here")
    assert trained.config.init_from == "mae.pth"
    out = capsys.readouterr().out
    assert re.search(r"trained\W+50\.0\W+75\.0", out)
    assert re.search(r"raw pixels\W+25\.0\W+-", out)
    assert "picture:     a.png" in out
    assert "checkpoint:  here/checkpoints" in out


def test_a_run_is_named_after_its_config(trained, tmp_path):
    text = "VARIANTS = ('small',)\nfrom ml_collections import ConfigDict\n"
    text += "def get_config(variant='small'):\n    return ConfigDict()\n"
    (tmp_path / "mine.py").write_text(text)
    for name, folder in (
        ("mae:tiny", "mae-tiny"),
        ("mae", "mae"),
        ("mine.py", "mine"),
        (f"{tmp_path}/mine.py:small", "mine-small"),
    ):
        assert run("train", "--config", name) == 0
        assert trained.folder == Path("runs") / folder


def test_a_run_that_was_told_to_stop_has_an_exit_code_of_its_own(trained, capsys):
    from mim_jax.training.interruption import Interrupted

    trained.error = Interrupted("SIGTERM at step 3: everything is saved")
    assert run("train", "--config", "mae:tiny") == 75
    assert capsys.readouterr().out.strip() == "SIGTERM at step 3: everything is saved"


@pytest.mark.parametrize("kind", [ValueError, OSError, ImportError, RuntimeError])
def test_an_error_is_one_message_unless_the_trace_is_wanted(trained, error_of, monkeypatch, kind):
    trained.error = kind("the disk is full; make room")
    assert error_of("train", "--config", "mae:tiny") == "the disk is full; make room"
    trained.error = kind()
    assert error_of("train", "--config", "mae:tiny") == kind.__name__
    monkeypatch.setenv("MIM_JAX_TRACEBACK", "1")
    with pytest.raises(kind):
        run("train", "--config", "mae:tiny")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.image_size=(8,13)"], "nearest size that fits is (8, 12)"),
        (["--config.model.mask_ratio=0.99"], "leaves none of 6 tokens"),
        (["--config.model.size=huuge"], "known are tiny, small, base, large, huge"),
        (["--config.model.heads=3"], "width 16 is not divisible by 3 attention heads"),
        (["--config.model.remat=most"], "remat is 'most'; known are none, full, dots"),
        (["--config.model.patch_size=(0,4)"], "at least 1 pixel"),
        (["--config.compute_dtype=half"], "compute_dtype is 'half'"),
        (["--config.data.channels=3"], "give one value for each channel"),
        (["--config.method=mea"], "Did you mean 'mae'?"),
        (["--config.mesh.fsdp=3"], "does not fit 8 devices"),
        (["--config.batch_size=7"], "batch_size 7 is not divisible"),
        (["--config.optimizer.name=sgd"], "known are adamw, adam, lars"),
    ],
)
def test_what_does_not_fit_together_is_one_clear_message(error_of, flags, message):
    assert message in error_of("inspect", *TINY, *flags)


def table_of(out: str) -> dict[str, list[str]]:
    """Cells of the parameter table by path."""
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in out.splitlines()
        if line.startswith("│")
    ]
    return {row[0]: row[1:] for row in rows}


def test_inspect_shows_every_parameter_with_spec_bytes_and_flops(capsys):
    assert run("inspect", *TINY) == 0
    out = capsys.readouterr().out
    table = table_of(out)
    assert len(table) == 60
    shape, spec, size, trained = table["encoder/transformer/blocks_0/attention/qkv/kernel"]
    assert shape == "(16, 3, 2, 8)"
    assert "fsdp" not in spec
    assert size == f"{16 * 3 * 2 * 8 * 4:,}"
    assert trained == "yes"
    parameters = sum(leaf.size for leaf in jax.tree.leaves(tiny_params()))
    assert f"parameters:  {parameters:,}, of which {parameters:,} are trained" in out
    assert "mesh:        data=8, fsdp=1, tensor=1; strategy replicated" in out
    assert re.search(r"model FLOPs: \d+\.\d+ GFLOP per image", out)


def test_sharding_the_parameters_shrinks_the_bytes_of_each_device(capsys):
    def bytes_by_path(*flags: str) -> dict[str, int]:
        assert run("inspect", *TINY, *flags) == 0
        table = table_of(capsys.readouterr().out)
        return {path: int(row[2].replace(",", "")) for path, row in table.items()}

    whole = bytes_by_path()
    cut = bytes_by_path("--config.mesh.fsdp=4", "--config.sharding.strategy=fsdp")
    assert set(cut) == set(whole)
    for path in whole:
        assert cut[path] in (whole[path], whole[path] // 4), path
    kernel = "encoder/transformer/blocks_0/mlp/fc1/kernel"
    assert cut[kernel] == whole[kernel] // 4
    assert sum(cut.values()) < 0.3 * sum(whole.values())


def test_inspect_can_simulate_another_number_of_devices(tmp_path):
    """In a process of its own, since a process counts its devices once."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "mim_jax", "inspect", "--devices=4", *TINY]
    done = subprocess.run(
        [*command, "--config.mesh.tensor=2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "mesh:        data=2, fsdp=1, tensor=2" in done.stdout


def test_evaluate_needs_a_run(error_of):
    assert error_of("evaluate") == "evaluate needs --run."


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_evaluating_a_folder_that_holds_no_run_is_an_error(error_of, name):
    assert "holds no complete checkpoint" in error_of("evaluate", "--run", name)


def test_evaluate_passes_its_flags_on_and_prints_a_table(monkeypatch, capsys):
    given = {}

    def evaluate_run(folder, **options):
        given.update(options, run=folder)
        return {"trained": {"knn": 0.123}}

    monkeypatch.setattr("mim_jax.evaluation.run.evaluate_run", evaluate_run)
    flags = ["--run=a", "--step=3", "--protocol=knn,linear", "--data=folder:x", "--pool=mean"]
    assert run("evaluate", *flags, "--nobaselines") == 0
    assert given == dict(
        run=Path("a"),
        step=3,
        protocols=["knn", "linear"],
        data="folder:x",
        pool="mean",
        baselines=False,
    )
    assert re.search(r"trained\W+12\.3", capsys.readouterr().out)


def test_an_unknown_pooling_is_an_error_that_lists_the_known(error_of):
    message = error_of("evaluate", "--run=a", "--pool=max")
    assert "method" in message
    assert "mean" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "convert needs --output."),
        (["--output=x.pth"], "convert needs either --run (to export) or --input (to import)."),
        (["--output=x", "--run=a", "--input=b"], "convert needs either --run"),
        (["--output=x", "--input=b.pth"], "convert --input needs --config"),
        (["--output=x.pth", "--run=nowhere"], "holds no complete checkpoint"),
        (["--output=x", "--input=no.pth", *TINY], "no checkpoint file no.pth"),
    ],
)
def test_an_incomplete_conversion_is_an_error_that_says_what_is_missing(error_of, flags, message):
    assert message in error_of("convert", *flags)


def test_convert_there_and_back_gives_the_identical_file(capsys, tmp_path):
    source = tmp_path / "mae.safetensors"
    write_state_dict(source, tiny_mae().layout().save(tiny_params()))
    assert run("convert", *TINY, f"--input={source}", "--output=run") == 0
    assert "initialized 60 of 60 arrays" in capsys.readouterr().out
    assert run("convert", "--run=run", "--output=again.safetensors") == 0
    assert "read back exactly" in capsys.readouterr().out
    assert (tmp_path / "again.safetensors").read_bytes() == source.read_bytes()


@pytest.fixture
def no_compilation_cache():
    """JAX without the cache that these tests share, for one test that compiles nothing."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache(no_compilation_cache, trained, tmp_path):
    assert run("train", "--config", "mae:tiny") == 0
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "mim_jax" / "xla")


def test_a_cache_that_the_user_chose_is_left_alone(no_compilation_cache, trained, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert run("train", "--config", "mae:tiny") == 0
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_scores_of_the_same_name_are_told_apart_by_their_protocol() -> None:
    row = {"knn": 0.5, "classification/top1": 0.5, "patch_local/linear": 0.5, "linear": 0.5}
    headers = [column.header for column in cli.score_table({"trained": row}).columns]
    assert headers == ["features", "knn", "top1", "patch_local/linear", "linear"]


@pytest.mark.parametrize(("count", "prefix"), [(17, ""), (4, "synthetic:collections:")])
def test_scores_that_are_too_wide_for_columns_are_rows(count: int, prefix: str) -> None:
    row = {f"detection/auc/{prefix}{number}": number / 10 for number in range(count)}
    first = next(iter(row))
    table = cli.score_table({"trained": row, "untrained": {first: 0.5}})
    headers = [column.header for column in table.columns]
    assert headers == ["score", "trained", "untrained"]
    assert [list(column.cells)[:2] for column in table.columns] == [
        [f"{prefix}0", f"{prefix}1"],
        ["0.0", "10.0"],
        ["50.0", "-"],
    ]
