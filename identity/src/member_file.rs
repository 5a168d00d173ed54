//! The list of seeds and schedulers on disk, for the day the scheduler is gone. JSON, so that people can read and mend it.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use hawker_core::message::Role;
use serde::{Deserialize, Serialize};

use hawker_api::convert::{MAX_MEMBERS, Member};

/// Longest file that is read: far more than [`MAX_MEMBERS`] members take.
const MAX_FILE_BYTES: u64 = 8 << 20;

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    members: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    peer_id: String,
    name: String,
    addresses: Vec<String>,
    role: String,
    #[serde(default)]
    zone: String,
}

const VERSION: u32 = 1;

/// Loads the list that [`save`] wrote; nothing when there is no file. Entries that make no sense are left out.
///
/// Errors: the file can't be read, or is no member list. Ours; the file can be removed, it fills again.
pub fn load(path: &Path) -> io::Result<Vec<Member>> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(_) => {}
    }
    let file: File = serde_json::from_slice(&fs::read(path)?)?;
    if file.version != VERSION {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a member list of another version of Hawker",
        ));
    }
    Ok(file
        .members
        .into_iter()
        .take(MAX_MEMBERS)
        .filter_map(member)
        .collect())
}

/// Puts the list in place: by write, fsync, rename.
pub fn save(path: &Path, members: &[Member]) -> io::Result<()> {
    let file = File {
        version: VERSION,
        members: members.iter().map(entry).collect(),
    };
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let new = path.with_extension("new");
    let mut out = fs::File::create(&new)?;
    out.write_all(&serde_json::to_vec_pretty(&file)?)?;
    out.sync_all()?;
    fs::rename(new, path)
}

fn entry(member: &Member) -> Entry {
    Entry {
        peer_id: member.peer.to_string(),
        name: member.name.clone(),
        addresses: member.addresses.clone(),
        role: member.role.to_string(),
        zone: member.zone.clone(),
    }
}

fn member(entry: Entry) -> Option<Member> {
    let role = [Role::Peer, Role::Seed, Role::Scheduler]
        .into_iter()
        .find(|role| role.to_string() == entry.role)?;
    let peer = entry.peer_id.parse().ok()?;
    Some(Member {
        peer,
        name: entry.name,
        addresses: entry.addresses,
        role,
        zone: entry.zone,
    })
}

#[cfg(test)]
mod tests {
    use hawker_core::piece::PeerId;

    use super::*;

    #[test]
    fn a_list_survives_the_disk_and_no_file_is_an_empty_list() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/members.json");
        assert_eq!(load(&path).unwrap(), []);
        let member = Member {
            peer: PeerId([7; 16]),
            name: "s".into(),
            addresses: vec!["[::1]:6501".into()],
            role: Role::Seed,
            zone: "z".into(),
        };
        save(&path, std::slice::from_ref(&member)).unwrap();
        assert_eq!(load(&path).unwrap(), [member]);
        fs::write(&path, "{").unwrap();
        assert!(load(&path).is_err());
    }
}
