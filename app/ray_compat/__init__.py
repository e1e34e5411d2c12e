"""Every use of private parts of Ray and Ray Serve, behind functions of our own."""
