"""Which files count as videos: for the stage `clips`, for the nightly inbox, and for the forecast of `cf plan`."""

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".mts", ".m2ts", ".3gp", ".ogv")
