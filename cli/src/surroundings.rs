//! Facts of this host that a configuration is checked against.

use std::path::Path;

use hawker_config::Effective;

use crate::member;
use crate::resolve::Surroundings;

/// Of a proxy, and of all in one.
pub(crate) fn of_proxy(effective: &Effective) -> Surroundings {
    surroundings_of(&member::identity_dir(&effective.config.data_dir))
}

/// Of a scheduler alone.
pub(crate) fn of_scheduler(effective: &Effective) -> Surroundings {
    surroundings_of(&member::scheduler_identity_dir(&effective.config.data_dir))
}

fn surroundings_of(identity_dir: &Path) -> Surroundings {
    Surroundings {
        has_identity: member::has_identity(identity_dir),
        has_token: std::env::var_os(member::TOKEN_VARIABLE).is_some(),
    }
}
