"""What each KV codec costs in quality: `zipserve bench quality`.

Each window's context is prefilled exactly and sealed by every codec. Then the tokens after it are computed once per
codec, attending to the coded context and to their own exact KV, and compared with the model's own, exact answer.
"""
