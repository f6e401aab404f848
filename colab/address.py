"""The address of the repository: the one place that notebooks, the site and the papers of the repository have it from."""

REPOSITORY = "https://github.com/structmat/structmat"
