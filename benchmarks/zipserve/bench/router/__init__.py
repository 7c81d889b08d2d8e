"""`zipserve bench router`: what one router process costs, before workers that cost nothing."""
