"""What the verbs of `mim-jax` share: flags, those of a config among them, and help."""

import sys

import ml_collections
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from mim_jax import config as configs

HELP_FLAGS = {"--help", "-h"}

HIDDEN_FLAGS = ("config", "config_name", "help", "flagfile", "undefok")


class HelpShown(Exception):
    """The user asked for the flags of a verb, and has seen them."""


def with_underscores(argument: str) -> str:
    """A flag whose name may be written with dashes, `--init-from=x`, as absl knows it."""
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{separator}{value}"


def define_config(values: flags.FlagValues, arguments: list[str]) -> None:
    """Takes `--config NAME` out of the arguments, and makes every field a flag.

    An override that comes again replaces the earlier one; absl would join two tuples.

    Raises:
        ValueError: if it is missing, or an override names an unknown field.
    """
    name = None
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            name = arguments[i + 1]
            del arguments[i : i + 2]
            break
        if argument.startswith("--config="):
            name = argument.partition("=")[2]
            del arguments[i]
            break
    if not HELP_FLAGS.isdisjoint(arguments):
        name = name or "mae:tiny"
    if name is None:
        known = ", ".join(configs.known_configs())
        raise ValueError(f"--config is missing; known configs are {known}, such as mae:tiny.")
    config = configs.load(name)
    for argument in arguments:
        if argument.startswith("--config."):
            configs.check_field(config, _override_field(argument))
    arguments[:] = _without_repeats(arguments)
    flags.DEFINE_string("config_name", name, "As given by --config.", flag_values=values)
    config_flags.DEFINE_config_dict(
        "config", config, "Fields of the config.", flag_values=values, sys_argv=["", *arguments]
    )


def _override_field(argument: str) -> str:
    """`data.flip` for `--config.data.flip=no`."""
    return argument.removeprefix("--config.").partition("=")[0]


def _without_repeats(arguments: list[str]) -> list[str]:
    """The arguments, with only the last override of each field."""
    groups: list[list[str]] = []  # a flag, and its value if that is a word of its own
    for argument in arguments:
        if argument.startswith("--") or not groups:
            groups.append([argument])
        else:
            groups[-1].append(argument)
    last = {_override_field(group[0]): group for group in groups}
    return [
        word
        for group in groups
        if not group[0].startswith("--config.") or last[_override_field(group[0])] is group
        for word in group
    ]


def parse_only(values: flags.FlagValues, verb: str, arguments: list[str]) -> None:
    """Reads flags into `values`.

    Raises:
        HelpShown: after the flags were printed, if the user asked for them.
        ValueError: an argument that is no flag.
    """
    flags.DEFINE_bool("help", False, "Show the flags.", short_name="h", flag_values=values)
    rest = values([f"mim-jax {verb}", *arguments])[1:]
    if values.help:
        print(help_text(values, verb))
        raise HelpShown
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; flags begin with --.")


def parse(
    values: flags.FlagValues, verb: str, arguments: list[str]
) -> ml_collections.ConfigDict | None:
    """The config with all overrides, or None if the command has none.

    Raises:
        ValueError: if a value does not have the type of its field.
    """
    parse_only(values, verb, arguments)
    if "config" not in values:
        return None
    config = configs.load(values.config_name)
    # absl checks numbers, but takes any word for a tuple.
    configs.override(config, configs.leaves(values.config))
    return config


def help_text(values: flags.FlagValues, verb: str) -> str:
    """The flags of a verb, and the fields of its config with their values."""
    lines = [f"mim-jax {verb}", ""]
    for name in sorted(values):
        flag = values[name]
        if name == flag.name and name not in HIDDEN_FLAGS:
            lines.append(f"  --{name}: {flag.help} Default: {flag.default}")
    if "config" in values:
        lines += ["  --config: Name of a config, or path of a config file, with :VARIANT.", ""]
        lines += [f"  Fields, as set by {values.config_name}:"]
        lines += [
            f"    --config.{field}={value!r}"
            for field, value in configs.leaves(values.config).items()
        ]
    return "\n".join(lines)


def require(values: flags.FlagValues, verb: str, name: str) -> None:
    """Raises `ValueError` if a flag has no value that a verb cannot do without."""
    if not values[name].value:
        raise ValueError(f"{verb} needs --{name}.")


def wide_console() -> Console:
    """A console for tables.

    In a file or a pipe there is no width to keep to, and paths are best read in one piece.
    """
    return Console(width=None if sys.stdout.isatty() else 160)
