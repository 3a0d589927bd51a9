import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from base import files
from base.config import ConfigError, load
from data.samples.images import decode_image
from data.sources.draws import Draws
from quickstart.pictures.art import render
from quickstart.pictures.captions import captions, instructions, with_article
from quickstart.pictures.config import EmojiConfig
from quickstart.pictures.edits import PERCENT, Edit
from quickstart.pictures.identities import identities
from quickstart.pictures.scenes import BACKGROUND_NAMES, BACKGROUNDS, KINDS, OBJECT_NAMES, Kind, Placed, Scene
from quickstart.pictures.source import RECIPE, EmojiSource, edit_at, emoji_sources, scene_at

CONFIG = EmojiConfig()  # what the quickstart makes
NUM_SCENES = {False: CONFIG.train_scenes, True: CONFIG.validation_scenes}
NUM_EDITS = {False: CONFIG.train_edits, True: CONFIG.validation_edits}


@pytest.fixture(scope="module")
def scenes():
    """{held out: [(scene, captions)]}, the full sets of the quickstart, without their pixels."""
    return {
        held_out: [
            (scene, captions(scene, draws))
            for scene, draws in (scene_at(CONFIG.seed, i, held_out=held_out) for i in range(number))
        ]
        for held_out, number in NUM_SCENES.items()
    }


@pytest.fixture(scope="module")
def edits():
    return {
        held_out: [edit_at(CONFIG.seed, i, held_out=held_out)[0] for i in range(number)]
        for held_out, number in NUM_EDITS.items()
    }


def source(name: str, config: EmojiConfig = CONFIG) -> EmojiSource:
    return next(source for source in emoji_sources(config) if source.name == name)


def truth(sample):
    return json.loads(sample.parts["json"])


def pixels(sample, part="png"):
    return np.asarray(decode_image(sample, part)).astype(int)


def test_no_held_out_caption_or_combination_is_in_training(scenes):
    train = {text for _, texts in scenes[False] for text in texts}
    validation = {text for _, texts in scenes[True] for text in texts}
    assert not train & validation
    combinations = {held_out: {scene.combination for scene, _ in pairs} for held_out, pairs in scenes.items()}
    assert not combinations[False] & combinations[True]
    assert len(combinations[True]) > 150  # validation is not a handful of scenes


def test_no_held_out_edit_result_is_in_training(scenes, edits):
    seen = {scene.combination for scene, _ in scenes[False]}
    seen |= {scene.combination for edit in edits[False] for scene in (edit.source, edit.target)}
    assert not seen & {edit.target.combination for edit in edits[True]}


def test_every_object_and_background_is_in_training(scenes):
    kinds = Counter(placed.kind.name for scene, _ in scenes[False] for placed in scene.objects)
    backgrounds = Counter(scene.background for scene, _ in scenes[False])
    assert set(kinds) == set(OBJECT_NAMES) and set(backgrounds) == set(BACKGROUND_NAMES)
    assert min(kinds.values()) >= 60  # expected: 16000 * 1.4 / 35 / 4 = 160 for one skin tone


def test_about_six_scenes_of_ten_show_one_object(scenes):
    single = np.mean([len(scene.objects) == 1 for scene, _ in scenes[False]])
    assert abs(single - 0.6) < 0.02  # five standard errors of 16000 draws


def test_every_caption_names_objects_and_background(scenes):
    for scene, texts in scenes[False][:3000]:
        assert len(set(texts)) == 2
        for text in texts:
            assert f"{scene.background} background" in text
            assert all(placed.kind.name in text for placed in scene.objects)
            words = text.replace(",", "").split()
            for article, word in pairwise(words):
                if article in ("a", "an"):
                    assert article == ("an" if word[0] in "aeiou" else "a"), text


def test_articles():
    assert with_article("elephant") == "an elephant"
    assert with_article("red apple") == "a red apple"


def test_objects_stay_inside_and_apart(scenes):
    for scene, _ in scenes[False]:
        boxes = [placed.box(64) for placed in scene.objects]
        assert all(x0 >= 0 and y0 >= 0 and x1 <= 64 and y1 <= 64 for x0, y0, x1, y1 in boxes)
        if len(boxes) == 2:
            first, second = boxes
            assert (first[2] < second[0]) if scene.relation == "left" else (first[3] < second[1])


def test_edit_changes_only_its_boxes():
    data = source("edits-train")
    kinds = set()
    for index in range(120):
        sample = data.sample(index)
        tree = truth(sample)
        kinds.add(tree["kind"])
        changed = (pixels(sample, "source.png") != pixels(sample, "target.png")).any(axis=2)
        assert changed.any()
        for x0, y0, x1, y1 in tree["changed"]:
            changed[y0:y1, x0:x1] = False
        assert not changed.any()
    assert kinds == set(PERCENT)


def test_edit_truth_agrees_with_instruction(edits):
    for edit in edits[False][:2000]:
        before, after = ([placed.kind.name for placed in s.objects] for s in (edit.source, edit.target))
        if edit.kind == "background":
            assert before == after and edit.source.background != edit.target.background
            continue
        assert edit.source.background == edit.target.background
        texts = instructions(edit, Draws(0, "test", 0))
        gone, new = set(before) - set(after), set(after) - set(before)
        sizes = (len(gone), len(new))
        assert sizes == {"add": (0, 1), "remove": (1, 0)}.get(edit.kind, (1, 1))
        if edit.kind == "skin":
            skin = edit.target.objects[edit.slot].kind.skin
            assert skin is not None and all(skin in text for text in texts)
        else:
            assert all(name in text for name in new for text in texts)


def test_instruction_wording():
    dog, star = Placed(Kind("dog"), 2, 20, 24), Placed(Kind("star"), 36, 20, 24)
    pair = Scene((dog, star), "blue", relation="left")
    add = Edit("add", replace(pair, objects=(dog,), relation=None), pair, 1)
    assert all(
        text.endswith("a star to the right of the dog") for text in instructions(add, Draws(0, "t", 0))
    )


def test_sample_is_a_function_of_seed_and_index():
    for name in ("scenes-train", "edits-validation", "identities-train"):
        one, two = source(name), source(name)
        two.sample(5)  # earlier calls leave no trace
        assert one.sample(3) == two.sample(3)
        assert one.sample(3).parts != source(name, replace(CONFIG, seed=1)).sample(3).parts


def test_draws_are_those_of_every_numpy_version():
    draws = Draws(0, "golden", 7)
    assert [draws.below(1000) for _ in range(6)] == [792, 937, 945, 142, 422, 288]


def test_a_changed_recipe_raises_its_number():
    """On failure raise quickstart.pictures.source.RECIPE; then put the new digest here."""
    trees = [truth(source(name).sample(i)) for name in ("scenes-train", "edits-train") for i in range(50)]
    assert (RECIPE, files.digest(trees)[:16]) == (2, "b628a5263d1f2caf")


def test_split_does_not_depend_on_the_seed():
    train = {scene_at(0, i, held_out=False)[0].combination for i in range(500)}
    validation = {scene_at(1, i, held_out=True)[0].combination for i in range(200)}
    assert not train & validation


def test_scene_json_is_the_truth_of_the_pixels():
    data = source("scenes-validation")
    for index in range(20):
        sample = data.sample(index)
        tree, image = truth(sample), pixels(sample)
        background = np.array(BACKGROUNDS[tree["scene"]["background"]])
        covered = np.zeros((64, 64), bool)
        for thing in tree["scene"]["objects"]:
            x0, y0, x1, y1 = thing["box"]
            covered[y0:y1, x0:x1] = True
            assert (image[y0:y1, x0:x1] != background).any()
        assert (image[~covered] == background).all()


def test_no_object_disappears_on_any_background():
    for kind in KINDS:
        for name, colour in BACKGROUNDS.items():
            image = np.asarray(render(Scene((Placed(kind, 17, 17, 30),), name))).astype(int)
            distance = np.linalg.norm(image - np.array(colour), axis=2)
            # 25 of 441: a light hand on white, the faintest pair, is still plainly visible.
            assert (distance > 25).sum() > 250, (kind.name, name)


def test_identities_are_distinct_and_balanced():
    assert len({glyph for glyph, _ in identities()}) == len(identities()) >= CONFIG.num_identities
    data = source("identities-train", EmojiConfig(num_identities=5, train_identities=20))
    labels = Counter(truth(data.sample(i))["label"] for i in range(len(data)))
    assert labels == dict.fromkeys(range(5), 4)


def test_image_px_scales_the_scene():
    small = source("scenes-train", replace(CONFIG, image_px=128))
    sample = small.sample(0)
    assert pixels(sample).shape == (128, 128, 3)
    box, half = truth(sample)["scene"]["objects"][0]["box"], truth(source("scenes-train").sample(0))
    assert box == [2 * side for side in half["scene"]["objects"][0]["box"]]


def test_manifest_source_names_licence_and_config():
    text = source("scenes-train").description
    assert "CC-BY 4.0" in text and "Twitter" in text
    assert text != source("scenes-train", replace(CONFIG, seed=1)).description


def test_shipped_config_is_the_default():
    assert load(EmojiConfig, "configs/quickstart/data.yaml") == CONFIG


@pytest.mark.parametrize("change", [{"image_px": 8}, {"train_scenes": 0}, {"num_identities": 5000}])
def test_bad_config_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(CONFIG, **change)


def test_class_scenes_show_one_object_of_every_class_in_turn() -> None:
    config = EmojiConfig(train_classes=90, validation_classes=44)
    source = next(source for source in emoji_sources(config) if source.name == "classes-train")
    trees = [json.loads(source.sample(index).parts["json"]) for index in range(len(source))]
    assert [tree["label"] for tree in trees[:46]] == [*range(44), 0, 1]
    for tree in trees:
        (placed,) = tree["scene"]["objects"]
        assert placed["name"] == tree["name"] == OBJECT_NAMES[tree["label"]]
    assert len({tree["scene"]["background"] for tree in trees}) == len(BACKGROUND_NAMES)
    assert "classes-train" not in {source.name for source in emoji_sources(EmojiConfig())}
