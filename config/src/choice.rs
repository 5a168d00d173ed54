//! The values of keys that are one of a few choices.

use std::path::PathBuf;

/// The source of names and passwords for registries. Files are read when they are needed, and again when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialSource {
    /// Docker's `config.json`, or podman's `auth.json`: with credential helpers.
    Docker(PathBuf),
    /// containerd's `config.toml`: the part of its CRI plugin under `registry`.
    Containerd(PathBuf),
    /// A Kubernetes pull secret, or a folder of them as they are mounted.
    Kubernetes(PathBuf),
    /// A variable of the environment that holds the text of Docker's `config.json`.
    Environment(String),
}

/// The right by which a registry's content is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AuthorizationMode {
    /// The client's, which it gets from the registry's own realm: challenges and tokens are passed on.
    #[default]
    Relay,
    /// The client's, which it gets here: this mirror is the realm, and asks the registry's with the client's credentials.
    Token,
    /// This node's, for every client. It does not keep clients apart.
    Node,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}
