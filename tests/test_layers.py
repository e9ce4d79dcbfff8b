"""Imports point down: from a room to the floors below it, and from nowhere in a circle."""

from __future__ import annotations

import graphlib

from tools.architecture import DOORS, FLOORS, PICTURE, imports, picture, room, rooms

FLOOR = {name: level for level, floor in enumerate(FLOORS) for name in floor}
# What sftmix reaches of the kernels besides their public names: the types of schedules, how large
# a workspace is for `plan`, how the extension was built for `doctor`, and objectives of logits for
# `--head logits`.
KERNELS = {
    f"sftmix_kernels{name}" for name in ("", ".schedules", ".peaks", ".extension", ".reference")
}


def test_every_room_stands_on_a_floor() -> None:
    found = set(rooms(imports()))
    assert len(found) > 10
    assert found <= set(FLOOR)


def test_imports_point_to_lower_floors() -> None:
    wrong = [
        (name, other)
        for name, below in rooms(imports()).items()
        for other in below
        if name != "sftmix_kernels" != other and FLOOR[other] >= FLOOR[name]
    ]
    assert wrong == []


def test_the_kernels_know_nothing_of_the_training_layer() -> None:
    assert rooms(imports())["sftmix_kernels"] == set()


def test_the_training_layer_reaches_public_names_of_the_kernels() -> None:
    reached = {
        other
        for name, others in imports().items()
        if room(name) != "sftmix_kernels"
        for other in others
        if room(other) == "sftmix_kernels"
    }
    assert reached <= KERNELS


def test_rooms_take_no_more_than_the_version_from_the_package() -> None:
    """`from sftmix import SFTMixTrainer` is for users: inside it would be a circle."""
    modules = imports()
    takers = {name for name, others in modules.items() if "sftmix" in others}
    assert takers == {"sftmix.cli", "sftmix.recipe.manifest"}
    names = ("config", "partitions", "reference", "trainer")
    training = {f"sftmix.training.{name}" for name in names}
    assert modules["sftmix"] == {"sftmix.pairs.partition", *training}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Of sftmix: the kernels have a test of their own."""
    graph = {
        name: {other for other in others if room(other) not in (*DOORS, "sftmix_kernels")}
        for name, others in imports().items()
        if room(name) not in (*DOORS, "sftmix_kernels")
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) > 80


def test_the_picture_is_current() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run python -m tools.architecture"
