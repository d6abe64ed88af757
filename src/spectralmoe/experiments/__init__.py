"""Many runs under one budget: a comparison of routers, learning from few images, and what cards store."""
