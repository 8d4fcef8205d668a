"""Makes the bucket of the DVC remote, if it isn't there. For compose.yaml; everything from the environment."""

import os

import botocore.session

bucket = os.environ["BUCKET"]
client = botocore.session.get_session().create_client("s3", region_name="us-east-1")
try:
    client.create_bucket(Bucket=bucket)
except (client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
    pass
client.head_bucket(Bucket=bucket)
