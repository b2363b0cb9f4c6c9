from pathlib import Path

import pytest

from server.config import Config, Section, load_config
from server.errors import ConfigError


def test_defaults_need_no_source(tmp_path: Path) -> None:
    """Without file, environment and options the tree is its defaults."""
    config = load_config(environment={"PATHFOX_HOME": str(tmp_path)})

    assert config.server.host == "127.0.0.1"
    assert config.home == tmp_path


def test_later_sources_win(tmp_path: Path) -> None:
    """The environment overrides the file, and the command line both."""
    path = tmp_path / "pathfox.toml"
    path.write_text(
        "[server]\nport = 1\nhost = '::1'\n[engine]\nmax_num_seqs = 2\n[[models]]\nname = 'a'\npath = 'x'\n"
    )

    config = load_config(
        path,
        environment={"PATHFOX__SERVER__PORT": "2", "PATHFOX__ENGINE__MAX_NUM_SEQS": "8"},
        options={"server.port": 3},
    )

    assert (config.server.port, config.server.host, config.engine.max_num_seqs) == (3, "::1", 8)
    assert config.models[0].name == "a"


def test_lists_in_the_environment_are_toml() -> None:
    """A variable that opens a list or table is read as TOML."""
    config = load_config(environment={"PATHFOX__MODELS": "[{name = 'm', path = '/w', aliases = ['a', 'b']}]"})

    assert config.models[0].aliases == ("a", "b")


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"PATHFOX__ENGINE__MAX_NUM_SEQ": "8"}, "PATHFOX__ENGINE__MAX_NUM_SEQ: engine.max_num_seq: unknown setting"),
        ({"PATHFOX__ENGINE__MAX_NUM_SEQS": "many"}, "PATHFOX__ENGINE__MAX_NUM_SEQS: engine.max_num_seqs"),
        ({"PATHFOX__SERVER__PORT": "70000"}, "PATHFOX__SERVER__PORT"),
        ({"PATHFOX__NOWHERE": "1"}, "PATHFOX__NOWHERE: nowhere: unknown setting"),
        ({"PATHFOX__MODELS": "[{"}, "PATHFOX__MODELS"),
        ({"PATHFOX__HOME__SERVER": "1", "PATHFOX_HOME": "x"}, "PATHFOX__HOME__SERVER: home is not a table"),
    ],
)
def test_a_bad_variable_is_named(environment: dict[str, str], complaint: str) -> None:
    """An unknown name or a bad value is refused with the name of the variable."""
    with pytest.raises(ConfigError, match=complaint.replace(".", r"\.")):
        load_config(environment=environment)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    """A file that is missing, no TOML, or has unknown names is refused with its path."""
    path = tmp_path / "pathfox.toml"
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path, environment={})
    path.write_text("[server\n")
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path, environment={})
    path.write_text("[server]\nprot = 1\n")
    with pytest.raises(ConfigError, match=f"{path}: server.prot: unknown setting"):
        load_config(path, environment={})


def test_the_tree_is_frozen() -> None:
    """Nobody changes a setting after it was read."""
    with pytest.raises(ValueError, match="frozen"):
        Config().server.port = 1  # type: ignore[misc]


def test_every_default_gives_its_reason() -> None:
    """Each field of each section has a docstring below it."""
    source = Path(__import__("server.config").config.__file__).read_text()
    for section in Section.__subclasses__():
        for name, field in section.model_fields.items():
            if isinstance(field.default, Section):
                continue
            place = source.index(f"    {name}: ", source.index(f"class {section.__name__}("))
            assert source[place:].split("\n", 2)[1].strip().startswith('"""'), f"{section.__name__}.{name}"
