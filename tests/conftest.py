import os

import pytest

# verl settles its platform at its first import, in whichever test module that happens. The tests of this process run on
# the CPU; those that need an accelerator start processes of their own.
os.environ.setdefault("VERL_PLATFORM", "cpu")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks
def pytest_collection_modifyitems(items):
    """Who goes with whom when several tests run at once: a file stays together, and there is one training at a time."""
    for item in items:
        trains = item.path.parent.name == "e2e"
        item.add_marker(pytest.mark.xdist_group("trainings" if trains else item.nodeid.partition("::")[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a test logged goes to another process in UTF-8, and some tests log halves of characters."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
