//! Whoever looks with bpftool sees named programs and maps whose fields have names, and finds them under `pointsman`.
use anyhow::{Context, Result, ensure};
use tests::{
    Stack, Verdicts,
    bpf::{self, MAP_TYPE_HASH, MAP_TYPE_LRU_HASH, Map},
    eventually,
    pins::bpftool,
    process::{freeze, thaw},
};

#[test]
fn programs_and_maps_have_names() {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let held = stack.look();
    assert!(!held.programs.is_empty() && !held.maps.is_empty());
    for program in held.programs {
        assert!(!bpf::program_name(program).unwrap().is_empty(), "program {program} has no name");
    }
    let mut typed = 0;
    for map in held.maps {
        let map = Map::by_id(map).unwrap();
        assert!(!map.name.is_empty(), "a map of kind {} has no name", map.kind);
        if [MAP_TYPE_HASH, MAP_TYPE_LRU_HASH].contains(&map.kind) {
            assert!(map.has_types, "the fields of {} have no names", map.name);
            typed += 1;
        }
    }
    assert!(typed > 0, "there is a map of connections");
}

#[test]
fn pins_lead_to_everything_that_is_at_work() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let held = stack.look();
    let set = stack.pins().pop().context("the gateway has pinned its programs")?;
    let name = set.file_name().and_then(|name| name.to_str()).context("a name")?;
    ensure!(name.starts_with(&format!("{}-{}-net", stack.http.port(), stack.https.port())), "{name}");
    for (kind, folder, ids) in
        [("prog", "programs", &held.programs), ("map", "maps", &held.maps), ("link", "links", &held.links)]
    {
        let pinned = std::fs::read_dir(set.join(folder))?;
        for path in pinned.map(|entry| entry.map(|entry| entry.path())) {
            let path = path?;
            let shown = bpftool(&[kind, "show", "pinned"], &path)?;
            let id = shown["id"].as_u64().with_context(|| format!("{shown}"))?;
            // The self-test's programs are gone, so what is pinned is what this process holds.
            let is_scratch = path.ends_with("pm_scratch") || path.ends_with("pm_flights");
            ensure!(
                is_scratch || ids.iter().any(|&held| u64::from(held) == id),
                "{} is not held",
                path.display()
            );
            // Linux keeps 15 characters of a name.
            let name = path.file_name().and_then(|name| name.to_str()).context("a name")?;
            ensure!(kind == "link" || shown["name"] == name[..name.len().min(15)], "{shown}");
        }
    }
    stack.stop();
    ensure!(!set.exists());
    Ok(())
}

#[test]
fn a_connection_is_shown_with_named_fields() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let set = stack.pins().pop().context("the gateway has pinned its programs")?;
    // A function that waits for more has let the connection retire; one that doesn't run has not.
    let hung = stack.processes_of("echo");
    freeze(&hung);
    let mut client = stack.client()?;
    client.send(b"GET /function/echo HTTP/1.1\r\nHost: x\r\nX-Field: ")?;
    let port = client.socket().local_addr()?.port();
    let dump = |map: &str| bpftool(&["map", "dump", "pinned"], &set.join("maps").join(map));
    eventually("the connection to be listed with its verdict", || {
        let entries = dump("pm_connections").unwrap();
        let values = entries.as_array()?.iter().map(|entry| &entry["formatted"]["value"]);
        let mut own = values.filter(|value| value["remote_port"] == port);
        let value = own.next()?;
        assert_eq!(value["local_port"], stack.http.port(), "{value}");
        assert!(value["next_sequence"].is_u64(), "{value}");
        (value["verdict"] != 0).then_some(())
    });
    let routes = dump("pm_routes")?;
    let route = &routes.as_array().and_then(|routes| routes.first()).context("a route")?["formatted"];
    ensure!(route["key"]["generation"] == 1 && route["value"]["index"].is_u64(), "{route}");
    let settings = dump("pm_settings")?;
    ensure!(settings[0]["formatted"]["value"]["generation"] == 1, "{settings}");
    thaw(&hung);
    client.send(b"here\r\n\r\n")?;
    ensure!(client.response()?.status() == 200);
    // Its first answer has retired it.
    let entries = dump("pm_connections")?;
    let ports = entries.as_array().context("an array")?.iter();
    ensure!(ports.map(|entry| &entry["formatted"]["value"]["remote_port"]).all(|other| *other != port));
    drop(client);
    stack.stop();
    Ok(())
}
