"""Methods, a file each: rollouts in; a loss, metrics and scores out.

opd.py and topd.py are the methods, topk_teacher.py OPD with a teacher known by its top-k, config.py their options. They share
batch.py and packed.py (checked batches, and what each token costs), reduction.py (from tokens to a loss), metrics.py (what is
reported), objective.py (what is returned), model_checks.py and vocabularies.py (what is asked of the models).
"""
