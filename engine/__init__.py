"""The one training loop. Other packages import only `engine.config`, `engine.files` and `engine.objective`."""
