-- Judge the claims of a plan, and take them if all fit.

local STALE = 'stale'

-- A plan is `bundles` times (draft, shape, claims), flat in `f` from `q` on; a claim is its key's suffix, its id (distinct
-- ids only), its subject (flag 8), amount, limit (-1: none) and, for calendars, start and end of the window as the client
-- works them out. `names` has the names of the cells, from `k` on. `kept`: claims by cell that stay as they were taken.
--
-- Gives whether all fit (or STALE: a calendar window is over), 1, the plan's number and
-- for each claim five numbers (fits, used, held, pin, resets),
-- and the holds to write, without their owners. Where not all fit nothing has changed.
local function take(f, q, bundles, names, k, at, plan, kept)
  local out, o, holds, refused = {1, plan}, 2, {}, false
  local todo, t = {}, 0
  for b = 1, bundles do
    local id = f[q + 1]
    local shape = shapes[id]
    local h, n = {'O', '', at, plan, f[q], id}, 6
    q = q + 2
    for i = 1, #shape, 5 do
      local kind, p1, p2, flags = shape[i], shape[i + 1], shape[i + 2], shape[i + 3]
      local name = names[k]
      k = k + 1
      h[n + 1] = f[q]
      n, q = n + 1, q + 1
      local member
      if kind == DISTINCT then
        member = f[q]
        h[n + 1] = member
        n, q = n + 1, q + 1
      end
      if flags >= 8 then
        h[n + 1] = f[q]
        n, q = n + 1, q + 1
      end
      local amount, limit = f[q], f[q + 1]
      q = q + 2
      local used, held, pin, resets, fits, cell
      local old = kept and kept[name]
      if old then
        if kind == CALENDAR then q = q + 2 end
        amount, limit, fits = old.amount, old.limit, true
        used, held, pin, resets = old.used, old.held, old.pin, old.resets
      elseif kind <= CALENDAR then
        cell = cells[name]
        if not cell or now >= cell[4] then
          if kind == CALENDAR then
            local start, finish = f[q], f[q + 1]
            if now < start or now >= finish then return STALE end
            cell = {0, 0, start, finish, nil, 2}
          else
            cell = {0, 0, now, now + p1, nil, 2}
          end
        end
        if kind == CALENDAR then q = q + 2 end
        used, held, pin, resets = cell[1], cell[2], cell[3], cell[4]
        fits = limit < 0 or used + held + amount <= limit
        if fits then
          if kind == LIFETIME and flag(flags, 4) and resets < now + p1 then resets = now + p1 end
        elseif amount > limit then
          resets = nil
        end
      elseif kind == SLIDING then
        cell = cells[name] or {0, 0, 0, 0, '', false}
        pin = (now - fmod(now, p1)) / p1
        if pin < cell[3] then pin = cell[3] end
        if now < cell[4] then
          used, held = cell[1], cell[2]
        else
          used, held = live(cell, pin - p2)
        end
        fits = limit < 0 or used + held + amount <= limit
        if fits then
          resets = now
        else
          resets = sliding_fits_at(cell, amount, limit, used + held, pin, p1, p2)
        end
      elseif kind == SLOTS then
        cell = cells[name] or {0, 0, 0, 0, nil, 2}
        used, held, pin = 0, cell[2], 0
        fits = limit < 0 or held + amount <= limit
      elseif kind == BUCKET then
        cell = cells[name] or {0, 0, now, now, nil, 2}
        local backlog
        pin, backlog = drained(cell, limit)
        used, held = in_units(cell, backlog, p1)
        local excess = backlog - ((limit > 0 and p2 * p1 or 0) - amount * p1)
        fits = excess <= 0
        if fits then
          resets = now
        elseif limit > 0 and amount <= p2 then
          resets = pin + ceil_div(excess, limit)
        end
      else
        name = MEMBERS .. sub(name, #CELL + 1)
        call('ZREMRANGEBYSCORE', name, '-inf', now)
        used, held, pin = call('ZCARD', name), 0, 0
        local known = used > 0 and call('ZSCORE', name, member)
        if known then used = used - 1 end
        fits = limit < 0 or (known and limit > 0) or used + amount <= limit
        if fits then
          resets = now + p1
          local last = (used > 0 or known) and call('ZREVRANGE', name, 0, 0, 'WITHSCORES')[2]
          if last and tonumber(last) > resets then resets = tonumber(last) end
        elseif amount <= limit then
          local first = call('ZRANGE', name, 0, 0, 'WITHSCORES')[2]
          resets = first and tonumber(first)
        end
      end
      out[o + 1], out[o + 2], out[o + 3], out[o + 4], out[o + 5] = fits and 1 or 0, used, held, pin, resets or -1
      o = o + 5
      h[n + 1], h[n + 2], h[n + 3], h[n + 4] = fits and amount or -1 - amount, limit, used, held
      h[n + 5] = (kind ~= SLIDING and kind < SLOTS) and at - pin or pin
      h[n + 6] = resets and resets - (kind <= ROLLING and pin + p1 or at)
      n = n + 6
      if fits and not old then
        todo[t + 1], todo[t + 2], todo[t + 3], todo[t + 4], todo[t + 5] = kind, name, cell or member, amount, resets
        t = t + 5
        if kind >= SLIDING then
          todo[t + 1], todo[t + 2], todo[t + 3], todo[t + 4] = pin, p1, p2, limit
          t = t + 4
        end
      elseif not fits and flags % 2 == 1 then
        refused = true
      end
    end
    h.n = n
    holds[b] = h
  end
  if refused then return false, out, holds end
  local i = 1
  while i <= t do
    local kind, name, cell, amount, resets = todo[i], todo[i + 1], todo[i + 2], todo[i + 3], todo[i + 4]
    i = i + 5
    if kind == DISTINCT then
      call('ZADD', name, resets, cell)
      call('PEXPIRE', name, todo[i + 1] + GRACE)
      i = i + 4
    else
      cells[name] = cell
      cell[7] = kind
      cell[2] = cell[2] + amount
      if kind <= CALENDAR then
        if kind == LIFETIME and resets > cell[4] then
          cell[4], cell[6] = resets, 2
        else
          cell[6] = cell[6] or 1
        end
      else
        local pin, p1, p2, limit = todo[i], todo[i + 1], todo[i + 2], todo[i + 3]
        i = i + 4
        if kind == SLOTS then
          cell[6] = cell[6] or 1
        elseif kind == BUCKET then
          local _, backlog = drained(cell, limit)
          fill(cell, limit, pin, backlog + amount * p1)
        else
          cell[2] = cell[2] - amount -- `change_part` counts it as well, and no sum may pass 2^53
          if change_part(cell, pin, 0, amount) then
            cell[6] = cell[6] or 1
          else
            cell[2] = cell[2] + amount
            cell[5] = cell[5] .. enc('<ddd', pin, 0, amount)
            forget_parts(cell, pin, p1, p2)
            cell[6] = 2
          end
        end
      end
    end
  end
  return true, out, holds
end
