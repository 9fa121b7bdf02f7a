"""The files by which a run at work is asked for traces, relative to its folder.

The launcher writes the request, rank 0 removes it when the traces are there and its answer says
where; see train/profiling.py and launcher/profile.py.
"""

PROFILE_FOLDER = "profile"  # STAGE/step_N/rank_R.json.gz below it
PROFILE_REQUEST = f"{PROFILE_FOLDER}/request.json"  # {"steps"}: trace so many from the next one on
PROFILE_ANSWER = f"{PROFILE_FOLDER}/answer.json"  # {"folder", "first", "steps", "world_size"}
