import gc

from server.cli.serve import start_collecting


def test_collecting_starts_when_a_start_has_put_it_off() -> None:
    """What the start made is never walked over again; a process that collects already is left alone."""
    before = gc.get_freeze_count()
    start_collecting()
    untouched = gc.get_freeze_count() - before
    gc.disable()
    try:
        start_collecting()
        is_on, num_frozen = gc.isenabled(), gc.get_freeze_count()
    finally:
        gc.unfreeze()
        gc.enable()

    assert (untouched, is_on) == (0, True)
    assert num_frozen > before + 1000
