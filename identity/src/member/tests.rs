//! Identities from a real authority, and TLS between them in memory.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use hawker_core::piece::PieceLayout;
use hawker_oci::digest::{Algorithm, ChainValue, Digest};

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn member(authority: &AuthorityKey, role: Role) -> Identity {
    let pending = Identity::request().unwrap();
    let certificate = authority
        .issue(&pending.certificate_request, role, DAY, SystemTime::now())
        .unwrap();
    pending
        .complete(certificate, authority.certificate().clone())
        .unwrap()
}

fn signed_table(issuer: &Identity, at: SystemTime) -> PieceTable {
    let mut table = PieceTable::new(
        Digest::of(Algorithm::Sha256, b"task"),
        PieceLayout::new(3 << 20),
    );
    table.push(ChainValue::initial(Algorithm::Sha256));
    issuer.sign(&mut table, false, Vec::new(), at);
    table
}

fn check(by: &Identity, table: &PieceTable) -> Option<Role> {
    let signed = table.signed().unwrap();
    by.check(
        signed,
        &table.statement(signed.sealed, signed.signed_at_s, &signed.registries),
    )
}

/// Runs a handshake in memory; gives the error of either side, or the certificate of the client as the server saw it.
fn handshake(
    client: Arc<rustls::ClientConfig>,
    server: Arc<rustls::ServerConfig>,
    name: ServerName<'static>,
) -> Result<Option<CertificateDer<'static>>, rustls::Error> {
    let mut client = rustls::ClientConnection::new(client, name)?;
    let mut server = rustls::ServerConnection::new(server)?;
    let mut wire = Vec::new();
    while client.is_handshaking() || server.is_handshaking() {
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut &wire[..]).unwrap();
        server.process_new_packets()?;
        wire.clear();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut &wire[..]).unwrap();
        client.process_new_packets()?;
        wire.clear();
    }
    client.writer().write_all(b"x").unwrap();
    client.write_tls(&mut wire).unwrap();
    server.read_tls(&mut &wire[..]).unwrap();
    server.process_new_packets()?;
    let mut byte = [0];
    server.reader().read_exact(&mut byte).unwrap();
    Ok(server
        .peer_certificates()
        .map(|chain| chain[0].clone().into_owned()))
}

#[test]
fn certificates_say_who_and_what_a_member_is() {
    let authority = AuthorityKey::generate("test").unwrap();
    for role in [Role::Peer, Role::Seed, Role::Scheduler] {
        let member = member(&authority, role);
        assert_eq!(member.role(), role);
        assert_eq!(
            member_of(&member.certificate()).unwrap(),
            (member.peer_id(), role)
        );
    }
}

#[test]
fn members_of_one_cluster_reach_each_other_by_id_and_role() {
    let authority = AuthorityKey::generate("test").unwrap();
    let (node, seed) = (
        member(&authority, Role::Peer),
        member(&authority, Role::Seed),
    );
    for name in [peer_name(seed.peer_id()), role_name(Role::Seed)] {
        let shown = handshake(
            node.client_config(b"a"),
            seed.server_config(b"a", false),
            name,
        )
        .unwrap();
        assert_eq!(member_of(&shown.unwrap()).unwrap().0, node.peer_id());
    }
}

#[test]
fn the_wrong_member_role_or_cluster_is_refused() {
    let (ours, theirs) = (
        AuthorityKey::generate("test").unwrap(),
        AuthorityKey::generate("test").unwrap(),
    );
    let (node, other) = (member(&ours, Role::Peer), member(&ours, Role::Peer));
    let stranger = member(&theirs, Role::Seed);
    let refused = |client: &Identity, server: &Identity, name| {
        handshake(
            client.client_config(b"a"),
            server.server_config(b"a", false),
            name,
        )
        .is_err()
    };
    assert!(refused(&node, &other, peer_name(node.peer_id())));
    assert!(refused(&node, &other, role_name(Role::Seed)));
    assert!(refused(&node, &stranger, role_name(Role::Seed)));
    assert!(refused(&stranger, &node, peer_name(node.peer_id())));
}

#[test]
fn a_client_without_certificate_gets_in_only_where_that_is_allowed() {
    let authority = AuthorityKey::generate("test").unwrap();
    let scheduler = member(&authority, Role::Scheduler);
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone()).unwrap();
    let mut anonymous = rustls::ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    anonymous.alpn_protocols = vec![b"a".to_vec()];
    let anonymous = Arc::new(anonymous);
    let with = |allowed| {
        handshake(
            Arc::clone(&anonymous),
            scheduler.server_config(b"a", allowed),
            role_name(Role::Scheduler),
        )
    };
    assert_eq!(with(true).unwrap(), None);
    assert!(with(false).is_err());
}

#[test]
fn a_removed_member_gets_in_only_where_strangers_do() {
    let authority = AuthorityKey::generate("test").unwrap();
    let (scheduler, node) = (
        member(&authority, Role::Scheduler),
        member(&authority, Role::Peer),
    );
    scheduler.removed().add([node.peer_id()]);
    let with = |strangers_too| {
        let server = scheduler.server_config(b"a", strangers_too);
        handshake(node.client_config(b"a"), server, role_name(Role::Scheduler))
    };
    // It gets in to be told that it was removed: its certificate is known there.
    assert_eq!(with(true).unwrap(), Some(node.certificate()));
    assert!(with(false).is_err());
}

#[test]
fn a_renewed_certificate_is_shown_by_configurations_made_before() {
    let authority = AuthorityKey::generate("test").unwrap();
    let (node, seed) = (
        member(&authority, Role::Peer),
        member(&authority, Role::Seed),
    );
    let (client, server) = (node.client_config(b"a"), seed.server_config(b"a", false));
    let renewed = authority
        .issue(
            &node.renewal_request().unwrap(),
            Role::Peer,
            2 * DAY,
            SystemTime::now(),
        )
        .unwrap();
    assert_ne!(renewed, node.certificate());
    let before = node.renew_at();
    node.clone().renew(renewed.clone()).unwrap();
    assert!(node.renew_at() > before);
    assert_eq!(
        handshake(client, server, role_name(Role::Seed)).unwrap(),
        Some(renewed)
    );
}

#[test]
fn a_certificate_for_another_key_or_from_another_authority_is_refused() {
    let (ours, theirs) = (
        AuthorityKey::generate("test").unwrap(),
        AuthorityKey::generate("test").unwrap(),
    );
    let (node, other) = (member(&ours, Role::Peer), member(&ours, Role::Peer));
    assert!(node.renew(other.certificate()).is_err());
    let request = node.renewal_request().unwrap();
    let foreign = theirs
        .issue(&request, Role::Seed, DAY, SystemTime::now())
        .unwrap();
    assert!(node.renew(foreign).is_err());
    assert_eq!(node.role(), Role::Peer);
}

#[test]
fn renewal_is_due_at_two_thirds_of_the_life() {
    let authority = AuthorityKey::generate("test").unwrap();
    let node = member(&authority, Role::Peer);
    let due = node.renew_at().duration_since(SystemTime::now()).unwrap();
    // 25 hours of life, of which one is over.
    let expected = Duration::from_secs(25 * 3600 / 3 * 2 - 3600);
    assert!(due.abs_diff(expected) < Duration::from_secs(10), "{due:?}");
}

#[test]
fn what_was_saved_is_loaded_and_the_key_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("identity");
    assert!(Identity::load(&dir).unwrap().is_none());
    let authority = AuthorityKey::generate("test").unwrap();
    let node = member(&authority, Role::Seed);
    node.save(&dir).unwrap();
    node.save(&dir).unwrap();
    let again = Identity::load(&dir).unwrap().unwrap();
    assert_eq!(
        (again.peer_id(), again.role(), again.certificate()),
        (node.peer_id(), node.role(), node.certificate())
    );
    assert_eq!(
        std::fs::metadata(dir.join(KEY_FILE))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    assert_eq!(
        check(&node, &signed_table(&again, SystemTime::now())),
        Some(Role::Seed)
    );
}

#[test]
fn an_authority_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    assert!(AuthorityKey::load(dir.path()).unwrap().is_none());
    let authority = AuthorityKey::generate("käse").unwrap();
    authority.save(dir.path()).unwrap();
    let again = AuthorityKey::load(dir.path()).unwrap().unwrap();
    assert_eq!(again.cluster(), "käse");
    assert_eq!(again.certificate(), authority.certificate());
    assert_eq!(
        std::fs::metadata(dir.path().join(KEY_FILE))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    let (before, after) = (member(&authority, Role::Peer), member(&again, Role::Seed));
    handshake(
        before.client_config(b"a"),
        after.server_config(b"a", false),
        role_name(Role::Seed),
    )
    .unwrap();
}

#[test]
fn names_in_a_request_count_for_nothing_and_it_must_be_signed_by_its_key() {
    let authority = AuthorityKey::generate("test").unwrap();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let wish = rcgen::CertificateParams::new(vec!["seed.hawker.internal".to_owned()]).unwrap();
    let mut request = wish.serialize_request(&key).unwrap().der().to_vec();
    let certificate = authority
        .issue(&request, Role::Peer, DAY, SystemTime::now())
        .unwrap();
    assert_eq!(member_of(&certificate).unwrap().1, Role::Peer);
    *request.last_mut().unwrap() ^= 1;
    assert!(
        authority
            .issue(&request, Role::Peer, DAY, SystemTime::now())
            .is_err()
    );
    let other_kind = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let request = wish.serialize_request(&other_kind).unwrap().der().to_vec();
    assert!(
        authority
            .issue(&request, Role::Peer, DAY, SystemTime::now())
            .is_err()
    );
}

#[test]
fn statements_of_members_count_with_their_role() {
    let authority = AuthorityKey::generate("test").unwrap();
    let (node, seed) = (
        member(&authority, Role::Peer),
        member(&authority, Role::Seed),
    );
    for _ in 0..2 {
        assert_eq!(
            check(&node, &signed_table(&seed, SystemTime::now())),
            Some(Role::Seed)
        );
        assert_eq!(
            check(&seed, &signed_table(&node, SystemTime::now())),
            Some(Role::Peer)
        );
    }
}

#[test]
fn a_statement_that_is_forged_in_any_part_does_not_count() {
    let (ours, theirs) = (
        AuthorityKey::generate("test").unwrap(),
        AuthorityKey::generate("test").unwrap(),
    );
    let (node, seed) = (member(&ours, Role::Peer), member(&ours, Role::Seed));
    let now = SystemTime::now();
    let table = signed_table(&seed, now);
    let good = table.signed().unwrap();
    let statement = table.statement(false, good.signed_at_s, &[]);
    assert_eq!(node.check(good, &statement), Some(Role::Seed));

    assert_eq!(
        node.check(good, &table.statement(true, good.signed_at_s, &[])),
        None
    );
    let elsewhere = ["r.example".to_owned()];
    assert_eq!(
        node.check(good, &table.statement(false, good.signed_at_s, &elsewhere)),
        None
    );
    assert_eq!(
        node.check(
            &SignedPrefix {
                issuer: node.peer_id(),
                ..good.clone()
            },
            &statement
        ),
        None
    );
    let mut signature = good.signature.clone();
    signature[0] ^= 1;
    assert_eq!(
        node.check(
            &SignedPrefix {
                signature,
                ..good.clone()
            },
            &statement
        ),
        None
    );
    assert_eq!(
        node.check(
            &SignedPrefix {
                certificate: Arc::from(&b"junk"[..]),
                ..good.clone()
            },
            &statement
        ),
        None
    );
    assert_eq!(
        check(&node, &signed_table(&member(&theirs, Role::Seed), now)),
        None
    );
    // Outside of the certificate's life, whether it has been seen before or not.
    assert_eq!(check(&node, &signed_table(&seed, now + 2 * DAY)), None);
    assert_eq!(check(&node, &signed_table(&seed, now - DAY)), None);
    assert_eq!(
        check(
            &member(&ours, Role::Peer),
            &signed_table(&seed, now + 2 * DAY)
        ),
        None
    );
}

#[test]
fn a_table_outlives_its_issuers_certificate() {
    let authority = AuthorityKey::generate("test").unwrap();
    let long_ago = SystemTime::now() - 30 * DAY;
    let pending = Identity::request().unwrap();
    let expired = authority
        .issue(&pending.certificate_request, Role::Seed, DAY, long_ago)
        .unwrap();
    let seed = pending
        .complete(expired, authority.certificate().clone())
        .unwrap();
    assert_eq!(
        check(
            &member(&authority, Role::Peer),
            &signed_table(&seed, long_ago)
        ),
        Some(Role::Seed)
    );
}

#[test]
fn secrets_are_not_shown() {
    let authority = AuthorityKey::generate("test").unwrap();
    let node = member(&authority, Role::Peer);
    assert_eq!(
        format!("{node:?}"),
        format!("Identity({:?}, peer)", node.peer_id())
    );
    assert_eq!(format!("{authority:?}"), "AuthorityKey(\"test\")");
    assert_eq!(
        format!("{:?}", Identity::request().unwrap()),
        "PendingIdentity"
    );
}
