"""Makes the bucket of the DVC remote, if it isn't there. For compose.yaml; everything from the environment."""

import contextlib
import os

import botocore.session

bucket = os.environ["BUCKET"]
client = botocore.session.get_session().create_client("s3", region_name="us-east-1")
with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
    client.create_bucket(Bucket=bucket)
client.head_bucket(Bucket=bucket)
