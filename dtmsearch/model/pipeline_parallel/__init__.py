"""A replica whose layers are split over several GPUs."""
