//! Whom a function runs as.
use std::ffi::CString;

use anyhow::{Context as _, Result, bail};
use nix::unistd::{self, getgrouplist};
use rustix::process::{Gid, RawUid, Uid};

/// Whoever holds no file: a function that isn't told otherwise can't touch anybody's.
const NOBODY: &str = "nobody";

/// The traditional id, for hosts without a list of users.
const NOBODY_ID: u32 = 65_534;

/// To the kernel not an id but "leave it as it is".
const NO_ID: RawUid = RawUid::MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: Uid,
    pub gid: Gid,
    pub groups: Vec<Gid>,
}

impl User {
    /// The user to change to, or `None` to stay `own`.
    pub fn of_function(configured: Option<&str>, own: Uid) -> Result<Option<Self>> {
        match configured {
            Some(user) if own.is_root() => Self::find(user).map(Some),
            Some(user) if Self::find(user)?.uid == own => Ok(None),
            Some(user) => bail!("only root can run it as user {user}, and this is user {}", own.as_raw()),
            None if own.is_root() => Ok(Some(Self::find(NOBODY).unwrap_or_else(|_| Self::bare(NOBODY_ID)))),
            None => Ok(None),
        }
    }

    /// By name or, if nobody has that name, by number.
    fn find(user: &str) -> Result<Self> {
        let failed = || format!("the users' list can't be searched for {user}");
        if let Some(found) = unistd::User::from_name(user).with_context(failed)? {
            return Self::listed(found);
        }
        let Some(uid) = user.parse().ok().filter(|&uid| uid != NO_ID) else {
            bail!("there is no user {user}");
        };
        match unistd::User::from_uid(unistd::Uid::from_raw(uid)).with_context(failed)? {
            Some(found) => Self::listed(found),
            None => Ok(Self::bare(uid)),
        }
    }

    fn listed(user: unistd::User) -> Result<Self> {
        let name = CString::new(user.name.as_str()).context("a user's name has a NUL")?;
        let groups = getgrouplist(&name, user.gid)
            .with_context(|| format!("the groups of user {} can't be found", user.name))?;
        Ok(Self {
            uid: Uid::from_raw(user.uid.as_raw()),
            gid: Gid::from_raw(user.gid.as_raw()),
            groups: groups.into_iter().map(|group| Gid::from_raw(group.as_raw())).collect(),
        })
    }

    /// A number that no user has, with the group of the same number.
    fn bare(id: u32) -> Self {
        Self { uid: Uid::from_raw(id), gid: Gid::from_raw(id), groups: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Uid {
        Uid::from_raw(1234)
    }

    fn of(configured: Option<&str>, own: Uid) -> Result<Option<u32>, String> {
        let user = User::of_function(configured, own).map_err(|error| format!("{error:#}"))?;
        Ok(user.map(|user| user.uid.as_raw()))
    }

    #[test]
    fn root_changes_to_whom_it_is_told_or_to_nobody() {
        assert_eq!(of(None, Uid::ROOT), Ok(Some(NOBODY_ID)));
        assert_eq!(of(Some("nobody"), Uid::ROOT), Ok(Some(NOBODY_ID)));
        assert_eq!(of(Some("root"), Uid::ROOT), Ok(Some(0)));
        assert_eq!(of(Some("4000000001"), Uid::ROOT), Ok(Some(4_000_000_001)));
    }

    #[test]
    fn who_is_not_root_stays() {
        assert_eq!(of(None, own()), Ok(None));
        assert_eq!(of(Some("1234"), own()), Ok(None));
        assert!(of(Some("root"), own()).unwrap_err().contains("only root can run it as user root"));
    }

    #[test]
    fn what_is_no_user_is_refused() {
        for user in ["", "no such user", "-1", "4294967295", "4294967296"] {
            assert_eq!(of(Some(user), Uid::ROOT), Err(format!("there is no user {user}")));
        }
    }

    #[test]
    fn a_listed_user_has_its_groups() {
        let root = User::find("root").unwrap();
        assert!(root.gid.as_raw() == 0 && root.groups.contains(&Gid::ROOT), "{root:?}");
        assert_eq!(User::find("0").unwrap(), root);
        assert_eq!(User::bare(7).groups, []);
    }
}
