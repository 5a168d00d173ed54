//! `hawker member ls` and `hawker member rm`, where the authority's data is.
//!
//! The authority's folder names every member that it made a certificate for, and those that were removed. The running schedulers
//! add who is connected: they are asked as by any member, with a certificate that the authority makes for this one question.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use hawker_api::v1;
use hawker_api::v1::scheduler_client::SchedulerClient;
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_identity::authority::{self, Authority, AuthorityError};
use hawker_identity::member::Identity;
use hawker_identity::{join, member_file};
use serde::Serialize;

use crate::args::{MemberListArgs, MemberRemoveArgs};
use crate::status::table;
use hawker_config::quantity::human_duration;

/// How long the certificate lives with which the schedulers are asked.
const ASKING: Duration = Duration::from_secs(300);
/// For one scheduler's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A member as it is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Shown {
    peer_id: String,
    name: String,
    role: String,
    addresses: Vec<String>,
    /// Seconds since 1970; 0 where it is not known.
    certificate_until_s: u64,
    /// `connected`, `away`, `removed`, or `unknown` where no scheduler answers.
    state: &'static str,
    /// The reason why the member refuses the pushed configuration; empty if it does not.
    configuration_error: String,
}

/// `hawker member ls`.
#[expect(
    clippy::print_stderr,
    reason = "what is missing from the list must not get into it"
)]
pub(crate) async fn list(args: &MemberListArgs) -> anyhow::Result<()> {
    let live = live(&args.data_dir).await;
    if let Err(error) = &live {
        eprintln!("hawker: {error:#}; who is connected is not known");
    }
    let members = gather(&args.data_dir, live.ok())?;
    if args.json {
        return Ok(crate::print::line(serde_json::to_string_pretty(&members)?)?);
    }
    let now_s = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    Ok(crate::print::line(render(&members, now_s).trim_end())?)
}

fn render(members: &[Shown], now_s: u64) -> String {
    let certificate = |member: &Shown| match member.certificate_until_s {
        0 => "?".to_owned(),
        until if until > now_s => format!("for {}", human_duration(until - now_s)),
        until => format!("expired {} ago", human_duration(now_s - until)),
    };
    let rows = members.iter().map(|member| {
        [
            member.name.clone(),
            member.role.clone(),
            member.state.to_owned(),
            certificate(member),
            member.addresses.join(" "),
            member.peer_id.clone(),
        ]
    });
    let mut out = String::new();
    table(
        &mut out,
        ["NAME", "ROLE", "STATE", "CERTIFICATE", "ADDRESSES", "ID"],
        rows.collect(),
        &[],
    );
    for member in members
        .iter()
        .filter(|member| !member.configuration_error.is_empty())
    {
        let line = format!(
            "{} refuses the pushed configuration: {}\n",
            member.name, member.configuration_error
        );
        out.push_str(&line);
    }
    out
}

/// `hawker member rm`.
pub(crate) async fn remove(args: &MemberRemoveArgs) -> anyhow::Result<()> {
    let data_dir = &args.data_dir;
    // Without a scheduler the authority's folder must do.
    let members = gather(data_dir, live(data_dir).await.ok())?;
    let (peer, name) = find(&members, &args.member)?;
    for own in [
        data_dir.join("scheduler/identity"),
        data_dir.join("proxy/identity"),
    ] {
        if Identity::load(&own)
            .ok()
            .flatten()
            .is_some_and(|identity| identity.peer_id() == peer)
        {
            bail!(
                "{peer} runs with the authority itself: stop it instead, or move the authority first"
            );
        }
    }
    let path = authority::remove_member(data_dir, peer)?;
    let folder = path.parent().unwrap_or(data_dir);
    crate::token::hand_over(&data_dir.join("authority"), &[&path, folder]).map_err(|error| {
        anyhow::anyhow!(
            "the authority can't read {}: {error}; run this as its user",
            path.display()
        )
    })?;
    let name = if name.is_empty() {
        String::new()
    } else {
        format!("{name} ")
    };
    Ok(crate::print::line(format!(
        "removed {name}({peer}): schedulers and nodes that are connected refuse it within seconds"
    ))?)
}

/// The one member that this id or name means.
fn find(members: &[Shown], text: &str) -> anyhow::Result<(PeerId, String)> {
    if let Ok(peer) = text.parse::<PeerId>() {
        let known = members.iter().find(|member| member.peer_id == text);
        return Ok((
            peer,
            known.map(|member| member.name.clone()).unwrap_or_default(),
        ));
    }
    let named = |member: &&Shown| member.name == text && member.state != "removed";
    let found: Vec<&Shown> = members.iter().filter(named).collect();
    match found[..] {
        [one] => Ok((
            one.peer_id.parse().context("a member's id")?,
            one.name.clone(),
        )),
        [] => bail!("no member has the name or id `{text}`: see `hawker member ls`"),
        _ => {
            let ids: Vec<&str> = found.iter().map(|member| member.peer_id.as_str()).collect();
            bail!(
                "{} members have the name `{text}`: give one's id, of {}",
                ids.len(),
                ids.join(", ")
            )
        }
    }
}

/// Everybody that the authority or a scheduler knows. `live`: the schedulers' answer, if one came.
fn gather(
    data_dir: &Path,
    live: Option<Vec<v1::MemberState>>,
) -> Result<Vec<Shown>, AuthorityError> {
    let mut members: BTreeMap<PeerId, Shown> = BTreeMap::new();
    let absent = if live.is_some() { "away" } else { "unknown" };
    for known in authority::known_members(data_dir)? {
        let shown = Shown {
            peer_id: known.peer.to_string(),
            name: known.name,
            role: known.role,
            addresses: Vec::new(),
            certificate_until_s: known.certificate_until_s,
            state: absent,
            configuration_error: String::new(),
        };
        members.insert(known.peer, shown);
    }
    for state in live.into_iter().flatten() {
        let role = state
            .member
            .as_ref()
            .and_then(|member| hawker_api::convert::from_role(member.role).ok());
        let Some((member, role)) = state.member.zip(role) else {
            continue;
        };
        let Some(peer) = PeerId::from_bytes(&member.peer_id) else {
            continue;
        };
        let shown = members.entry(peer).or_default();
        shown.peer_id = peer.to_string();
        shown.role = role.to_string();
        if !member.name.is_empty() {
            shown.name = member.name;
        }
        if !member.addresses.is_empty() {
            shown.addresses = member.addresses;
        }
        shown.certificate_until_s = shown.certificate_until_s.max(state.certificate_until_s);
        if !state.configuration_error.is_empty() {
            shown.configuration_error = state.configuration_error;
        }
        // Of several schedulers one suffices.
        let is_connected = state.certificate_until_s > 0 || role == Role::Scheduler;
        shown.state = if is_connected || shown.state == "connected" {
            "connected"
        } else {
            "away"
        };
    }
    for peer in authority::removed_members(data_dir)? {
        let shown = members.entry(peer).or_default();
        shown.peer_id = peer.to_string();
        shown.state = "removed";
    }
    let mut members: Vec<Shown> = members.into_values().collect();
    members.sort_by(|a, b| (&a.name, &a.peer_id).cmp(&(&b.name, &b.peer_id)));
    Ok(members)
}

/// The answers of all schedulers that answer.
async fn live(data_dir: &Path) -> anyhow::Result<Vec<v1::MemberState>> {
    let authority = Authority::open(data_dir, ASKING)?
        .ok_or_else(|| AuthorityError::Missing(data_dir.into()))?;
    let identity = authority.identity(Role::Peer)?;
    let file = data_dir.join("scheduler/members.json");
    let members = member_file::load(&file).with_context(|| file.display().to_string())?;
    let (mut states, mut answered) = (Vec::new(), false);
    let mut last = anyhow::anyhow!("no scheduler is known in {}", file.display());
    for scheduler in members
        .into_iter()
        .filter(|member| member.role == Role::Scheduler)
    {
        for address in &scheduler.addresses {
            match tokio::time::timeout(ANSWER_TIMEOUT, ask(address, &identity)).await {
                Ok(Ok(members)) => {
                    states.extend(members);
                    answered = true;
                    break;
                }
                Ok(Err(error)) => last = error,
                Err(_) => {
                    last = anyhow::anyhow!("the scheduler at {address} does not answer in time")
                }
            }
        }
    }
    if answered { Ok(states) } else { Err(last) }
}

async fn ask(address: &str, identity: &Identity) -> anyhow::Result<Vec<v1::MemberState>> {
    let connection = join::connect(address, identity).await?;
    let answer = SchedulerClient::new(connection.channel)
        .members(v1::MembersRequest {})
        .await;
    Ok(answer
        .map_err(|status| anyhow::anyhow!("{address}: {}", status.message()))?
        .into_inner()
        .members)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(id: u8, name: &str, state: &'static str) -> Shown {
        let peer_id = PeerId([id; 16]).to_string();
        Shown {
            peer_id,
            name: name.into(),
            role: "peer".into(),
            state,
            ..Shown::default()
        }
    }

    #[test]
    fn a_member_is_found_by_id_or_by_a_name_that_only_it_has() {
        let members = [
            shown(1, "a", "connected"),
            shown(2, "b", "away"),
            shown(3, "b", "away"),
            shown(4, "a", "removed"),
        ];
        let found = |text: &str| {
            find(&members, text)
                .map(|(peer, _)| peer.0[0])
                .map_err(|e| e.to_string())
        };
        assert_eq!(found("a"), Ok(1), "a removed member does not count");
        assert_eq!(found(&members[2].peer_id), Ok(3));
        assert_eq!(
            found(&PeerId([9; 16]).to_string()),
            Ok(9),
            "an id need not be known"
        );
        assert!(found("b").unwrap_err().contains(&members[1].peer_id));
        assert!(found("c").unwrap_err().contains("member ls"));
    }

    #[test]
    fn the_list_merges_records_answers_and_removals() {
        let dir = tempfile::tempdir().unwrap();
        assert!(gather(dir.path(), None).is_err(), "there is no authority");
        let authority = Authority::open_or_create(dir.path(), "c", ASKING).unwrap();
        let mut ids = Vec::new();
        for name in ["here", "gone", "bad"] {
            let token = authority::create_token(dir.path(), Role::Peer, ASKING).unwrap();
            let request = Identity::request().unwrap().certificate_request;
            let from = std::net::Ipv4Addr::LOCALHOST.into();
            let joined = authority
                .join(
                    &token.id,
                    &token.secret,
                    &request,
                    name,
                    from,
                    SystemTime::now(),
                )
                .unwrap();
            ids.push(hawker_identity::member::member_of(&joined.0).unwrap().0);
        }
        authority::remove_member(dir.path(), ids[2]).unwrap();
        let state = v1::MemberState {
            member: Some(v1::Member {
                peer_id: ids[0].0.to_vec(),
                name: "here".into(),
                addresses: vec!["10.0.0.1:6501".into()],
                role: v1::Role::Peer.into(),
                zone: String::new(),
            }),
            certificate_until_s: 1,
            configuration_error: "linger: is too long".into(),
            ..v1::MemberState::default()
        };
        let members = gather(dir.path(), Some(vec![state])).unwrap();
        let states: Vec<_> = members
            .iter()
            .map(|member| (member.name.as_str(), member.state))
            .collect();
        assert_eq!(
            states,
            [("bad", "removed"), ("gone", "away"), ("here", "connected")]
        );
        assert_eq!(members[2].addresses, ["10.0.0.1:6501"]);
        assert!(members.iter().all(|member| member.certificate_until_s > 1));
        let page = render(&members, members[0].certificate_until_s + 60);
        assert!(
            page.contains("here refuses the pushed configuration: linger: is too long"),
            "{page}"
        );
        assert!(
            page.contains("expired 1 min ago") && page.contains(&ids[0].to_string()),
            "{page}"
        );
    }
}
