"""Methods, a file each: rollouts in; a loss, metrics and scores out.

opd.py, trd.py, opsd.py and topd.py are the methods, topk_teacher.py OPD with a teacher known by its top-k, self_teacher.py the
weights with which a model teaches itself, config.py the options. TOPD has its windows and the transport between them in
look_ahead.py, windows of another engine in given_windows.py, its gate in gating.py.

They share method.py (what is kept between steps), inputs.py (a checked batch: batch.py or packed.py, pairs.py, the teacher's
side, and what is said of tokens), token_losses.py (what each token costs, from the states that rows.py pairs; top_k.py: on the
teacher's k tokens alone), reduction.py (from tokens to a loss), metrics.py (what is reported), diagnostics.py (sums over
tokens, and what follows from them; teacher_measures.py: what they ask of the teacher beside the scores), objective.py (what is
returned), model_checks.py and vocabularies.py (what is asked of the models).
"""
