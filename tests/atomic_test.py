"""moelab/atomic.py: whole or not at all, links and permissions kept."""

import os

import pytest

from moelab import atomic
from moelab.errors import UserError


def test_a_file_is_replaced_with_its_permissions_and_through_its_link(tmp_path):
    target, link = tmp_path / "a", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("a")
    assert atomic.write_text(link, "new") == link
    assert target.read_text() == "new" and link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]
    assert atomic.write_text(tmp_path / "x" / "y" / "z", "deep").read_text() == "deep"


def test_what_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic.replacing(target) as temporary:
        temporary.write_text("half")
        assert atomic.is_leftover(temporary)
        1 / 0  # noqa: B018
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    assert not atomic.is_leftover(target)


@pytest.mark.parametrize("make_folders", [False, True])
def test_a_target_that_cannot_be_written_is_refused_before(tmp_path, make_folders):
    (tmp_path / "file").touch()
    atomic.check_target(tmp_path / "new", make_folders=make_folders)
    atomic.check_target(tmp_path / "file", make_folders=make_folders)
    for path, message in (
        (tmp_path, "is a folder; a file was wanted"),
        (tmp_path / "file" / "x", "file is no folder"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            atomic.check_target(path, make_folders=make_folders)
    if make_folders:
        atomic.check_target(tmp_path / "far" / "off" / "x", make_folders=True)
    else:
        with pytest.raises(UserError, match="--out=.*the folder .*off is not there"):
            atomic.check_target(tmp_path / "far" / "off" / "x")
    assert os.listdir(tmp_path) == ["file"]
