"""The commit of a checkout, read from git's own files of any kind of checkout."""

from __future__ import annotations

from pathlib import Path

from mmtrain.config.installation import commit_of, head_of


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    first, second = "a" * 40, "b" * 40
    checkout, git = tmp_path / "repo", tmp_path / "repo/.git"
    checkout.mkdir()
    assert head_of(checkout) is None
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text(f"{first}\n")
    assert head_of(checkout) == first
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert head_of(checkout) is None  # no commit yet
    (git / "packed-refs").write_text(f"# pack-refs\n{second} refs/heads/other\n{first} refs/heads/main\n")
    assert head_of(checkout) == first
    (git / "refs/heads/main").write_text(f"{second}\n")
    assert head_of(checkout) == second
    tree, own = tmp_path / "tree", git / "worktrees/tree"
    tree.mkdir()
    own.mkdir(parents=True)
    (tmp_path / "tree/.git").write_text(f"gitdir: {own}\n")
    (own / "HEAD").write_text("ref: refs/heads/main\n")
    (own / "commondir").write_text("../..\n")
    assert head_of(tree) == second
    package = tree / "mmtrain"
    package.mkdir()
    assert head_of(package) == second and head_of(package / "model") is None
    assert commit_of(tree)[:12] == second[:12] and commit_of(tmp_path) == "unknown"
