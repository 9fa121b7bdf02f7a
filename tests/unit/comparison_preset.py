"""A preset of two arms at debug size, for the tests of comparisons."""

CONTROL = {
    "extends": "debug",
    "method": "contrastive",
    "stages": {
        "joint_reconstruction": None,
        "eos_bridged_reconstruction": None,
        "contrastive": {"init_from": "model"},
    },
}
PRESET = {
    "control": "alone",
    "reference": "whole",
    "held_out": {"unseen": {"path": "asset:emoji/unseen_concept"}},
    "validation": {"validation": {"path": "asset:emoji/validation"}},
    "curve_every_steps": 4,
    "pilot_steps": 8,
    "pilot_rounds": 1,
    "arms": {
        "alone": {"about": "control", "recipe": CONTROL},
        "whole": {"about": "three stages", "recipe": {"extends": "debug"}},
    },
    "ablations": {
        "mask": {
            "about": "mask ratio",
            "arms": ["whole"],
            "key": "stages.eos_bridged_reconstruction.objective.text_mask_ratio",
            "values": [0.5, 0.9],
        },
        "pairs": {
            "about": "pairs",
            "arms": ["alone", "whole"],
            "key": "stages.contrastive.data.sources.emoji.limit",
            "values": [32, None],
        },
    },
}
