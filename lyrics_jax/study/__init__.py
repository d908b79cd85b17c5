"""The study: trains Lyrics from scratch on a made-up world, and measures what it knows of scenes it has not seen."""
