"""What Frontline adds to the HAProxy that Ray Serve runs in front of the ingresses."""
