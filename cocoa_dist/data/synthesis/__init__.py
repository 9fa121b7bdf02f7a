"""Training records from pictures, written by a multimodal model behind an HTTP endpoint.

`prompts` are data, `talk` is what is said about one picture, `endpoint` one call, `caller` its
repetitions, pace and cost, `journal` what was ever asked and answered, `run` many pictures at once,
`assemble` the shards. The journal is the truth: all else follows from it. No torch here.
"""
